"Segmenters: the decoder against its plain form and against transformers, names, odd backbones"
import pytest, timm, torch, torch.nn.functional as F
from torch import nn
from sasformer.inference import predict_logits
from sasformer.segmenters import (ASPP, DeepLabV3PlusDecoder, MaskTransformer, Segmenter, SegformerDecoder,
                                  create_segmenter, list_segmenters)

channels, sizes = (8, 12, 20, 16), ((13, 18), (7, 9), (4, 5), (2, 3))


def features(**kw): return [torch.randn(2, c, *s, **kw) for c,s in zip(channels, sizes)]


def plain_merge(decoder, feats):
    "Project, upsample, concatenate deepest first, fuse"
    size = feats[0].shape[-2:]
    levels = [F.interpolate(p(f), size, mode='bilinear', align_corners=False) for p, f in zip(decoder.project, feats)]
    return decoder.fuse(torch.cat(levels[::-1], 1))


def test_merge_is_the_plain_one():
    torch.manual_seed(0)
    decoder, feats = SegformerDecoder(channels, 5, dim=24), features(dtype=torch.float64, requires_grad=True)
    decoder.double()
    inputs = [*feats, decoder.fuse.weight, *decoder.project.parameters()]
    a, b = plain_merge(decoder, feats), decoder.merge(feats)
    weight = torch.randn_like(a)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for p, q in zip(torch.autograd.grad((a*weight).sum(), inputs), torch.autograd.grad((b*weight).sum(), inputs)):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_merge_in_mixed_precision():
    torch.manual_seed(0)
    decoder, feats = SegformerDecoder(channels, 5, dim=24).eval(), features()
    with torch.autocast('cpu', torch.bfloat16): y = decoder(feats)
    assert y.dtype == torch.bfloat16
    exact = decoder(feats)   # two products of 24 numbers and a sum of four levels, each rounded to 8 bits
    assert (y.float()-exact).abs().max() < 4*torch.finfo(torch.bfloat16).eps*exact.abs().max()


def test_published_initialisation():
    torch.manual_seed(0)
    decoder = SegformerDecoder((32, 64, 160, 256), 21)
    assert abs(decoder.fuse.weight.std().item() - (2/256)**.5) < 1e-3   # He et al., by outputs
    assert decoder.fuse.bias is None and decoder.dropout.p == .1
    assert (decoder.norm.weight == 1).all() and (decoder.norm.bias == 0).all()


def test_segformer_of_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.SegformerConfig(num_labels=7, attn_implementation='sdpa')
    theirs = transformers.SegformerForSemanticSegmentation(config).eval()
    head = theirs.decode_head
    for s in head.batch_norm.state_dict().values():
        if s.is_floating_point(): s.uniform_(.5, 1.5)
    theirs.save_pretrained(tmp_path)
    ours = create_segmenter('segformer_mit_b0', 7, weights=str(tmp_path)).eval()
    for p, q in zip(ours.decoder.project, head.linear_projections):
        p.load_state_dict(dict(weight=q.proj.weight[...,None,None], bias=q.proj.bias))
    for name, m in dict(fuse=head.linear_fuse, norm=head.batch_norm, classify=head.classifier).items():
        getattr(ours.decoder, name).load_state_dict(m.state_dict())
    for m in [*ours.double().modules(), *theirs.double().modules()]:   # transformers leaves the blocks' at 1e-5
        if isinstance(m, nn.LayerNorm): m.eps = 1e-6
    for size in (64, 64), (67, 101):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name,kw,stride', [
    ('resnet18', {}, 4), ('swin_tiny_patch4_window7_224', dict(img_size=64), 4), ('pvt_v2_b0', {}, 4),
    ('vit_tiny_patch16_224', dict(out_indices=(3, 7, 11)), 16)])
def test_backbones(name, kw, stride):
    model = create_segmenter(f'segformer_{name}', 3, **kw).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64//stride, 64//stride)


small = dict(depth=2)   # layers of a ViT
# name, options, size of the scores of 64×96 pixels (84×84 for patches of 14)
models = [('deeplabv3plus_resnet10t', {}, (16, 24)), ('deeplabv3plus_efficientnet_b0', {}, (16, 24)),
          ('hrnet_hrnet_w18_small', {}, (16, 24)),
          *[(f'{d}_vit_tiny_patch16_224', small, s)
            for d,s in dict(segmenter=(4, 6), linear=(4, 6), setr=(4, 6), setrpup=(32, 48)).items()],
          ('segmenter_deit_tiny_distilled_patch16_224', small, (4, 6)),
          ('linear_eva02_tiny_patch14_224', small, (6, 6)),
          ('setr_vit_small_patch16_dinov3', small, (4, 6)), ('linear_vit_base_patch16_gap_224', small, (4, 6)),
          ('segmenter_vit_small_patch14_reg4_dinov2', small, (6, 6)),
          ('segformer_vit_tiny_patch16_224', small | dict(out_indices=(0, 1)), (4, 6))]


@pytest.mark.parametrize('name,kw,size', models)
def test_sizes_gradients_and_config(name, kw, size):
    torch.manual_seed(0)
    model, seen = create_segmenter(name, 5, **kw), []
    assert name in list_segmenters()
    hook = model.decoder.classify.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    y = model(torch.randn(2, 3, *((84, 84) if 'patch14' in name else (64, 96))))
    hook.remove()
    assert y.shape == (2, 5, *size) and seen[0].ndim == 4 and seen[0].shape[0] == 2 and seen[0].shape[2:] == size
    y.square().mean().backward()
    assert not [n for n,p in model.named_parameters() if p.grad is None]
    again, x = create_segmenter(**model.config).eval(), torch.randn(2, 3, 75, 97)
    again.load_state_dict(model.state_dict())
    assert not len(model.auxiliary) and torch.equal(predict_logits(again, x), predict_logits(model, x))
    assert predict_logits(model, x).shape == (2, 5, 75, 97) == predict_logits(model, x, window=64).shape
    model, x = model.double(), x.double()   # only the resizing of scores rounds to float32, coordinates up to 97
    y = predict_logits(model, x)
    eps = 97*torch.finfo(torch.float32).eps*y.abs().max().item()
    # padded there, or here
    torch.testing.assert_close(y, predict_logits(model, x, multiple=model.multiple), rtol=0, atol=eps)


def test_padded_scores_lie_where_the_image_is():
    "Scores that say where a patch is, say where each pixel is"
    model = Segmenter(nn.AvgPool2d(8), nn.Identity(), multiple=8)
    x = torch.stack(torch.meshgrid(torch.arange(59.), torch.arange(81.), indexing='ij'))[None].double()
    inside = (..., slice(4, 52), slice(4, 76))
    assert model(x).shape == x.shape
    torch.testing.assert_close(model(x)[inside], x[inside], rtol=0, atol=1e-10)
    assert torch.equal(model(x[..., :56, :80]), F.avg_pool2d(x[..., :56, :80], 8))   # nothing to pad, nothing to resize


def test_aspp_of_torchvision():
    deeplabv3 = pytest.importorskip('torchvision.models.segmentation.deeplabv3')
    torch.manual_seed(0)
    ours, theirs = ASPP(24, 16).double().eval(), deeplabv3.ASPP(24, [6, 12, 18], 16).double().eval()
    for p in theirs.state_dict().values():
        if p.is_floating_point(): p.uniform_(.1, .5)
    state = theirs.state_dict()
    assert [p.shape for p in state.values()] == [p.shape for p in ours.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values())))
    x = torch.randn(2, 24, 21, 27, dtype=torch.float64)
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    rates = lambda d: [b[0].dilation[0] for b in d.aspp.branches]
    assert rates(DeepLabV3PlusDecoder([8, 8], 2)) == [1, 6, 12, 18]
    assert rates(create_segmenter('deeplabv3plus_resnet10t', 2, output_stride=8).decoder) == [1, 12, 24, 36]


def test_branches_of_hrnet():
    with torch.device('meta'): model = create_segmenter('hrnet_hrnet_w48', 19)
    assert model.backbone.feature_info.channels() == [48, 96, 192, 384]
    assert model.backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert model.decoder.fuse[0].weight.shape == (720, 720, 3, 3)
    backbone = create_segmenter('hrnet_hrnet_w18_small', 3).backbone
    plain = timm.create_model('hrnet_w18_small')   # the whole network, before the layers of its classifier
    plain.load_state_dict(backbone.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        ours = backbone.double().eval()(x)
        plain.double()
        plain.eval()
        y = plain.act2(plain.bn2(plain.conv2(plain.act1(plain.bn1(plain.conv1(x))))))
        for a, b in zip(ours, plain.stages(y), strict=True): torch.testing.assert_close(a, b)


def test_last_layer_is_normalised():
    "The features of Segmenter and SETR are what timm's classifier sees, without the class token"
    for name in 'vit_tiny_patch16_224', 'vit_base_patch16_gap_224':   # the latter normalises the mean of the patches
        plain = timm.create_model(name, depth=2).eval()
        model = create_segmenter(f'linear_{name}', 3, depth=2).eval()
        norm = plain.fc_norm if isinstance(plain.norm, nn.Identity) else plain.norm
        for p in norm.parameters(): nn.init.uniform_(p, .5, 1.5)
        weights = {n.replace('fc_norm', 'norm'): p for n, p in plain.state_dict().items() if not n.startswith('head')}
        model.backbone.model.load_state_dict(weights)
        x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
        with torch.no_grad():
            expected = plain.double().forward_features(x)
            if norm is plain.fc_norm: expected = norm(expected)
            torch.testing.assert_close(model.double().backbone(x)[0].flatten(2).mT,
                                       expected[:, plain.num_prefix_tokens:], rtol=1e-10, atol=1e-10)


def test_mask_transformer_step_by_step():
    torch.manual_seed(0)
    decoder, f = MaskTransformer([64], 3, dim=128).double().eval(), torch.randn(2, 64, 4, 5, dtype=torch.float64)
    assert abs(decoder.classify.patch.weight.std().item() - 128**-.5) < .005
    assert len(decoder.blocks) == 2
    assert decoder.blocks[0].attn.num_heads == 2
    for p in decoder.parameters(): p.data += torch.randn_like(p)*.05
    with torch.no_grad():
        x = torch.cat([decoder.project(f.flatten(2).mT), decoder.tokens.expand(2, -1, -1)], 1)
        for b in decoder.blocks:
            q, k, v = b.attn.qkv(b.norm1(x)).unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
            x = x + b.attn.proj(((q @ k.mT)/8).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
            x = x + b.mlp(b.norm2(x))
        x, c = decoder.norm(x), decoder.classify
        cosines = F.cosine_similarity(c.patch(x[:, :20])[:, :, None], c.token(x[:, 20:])[:, None], dim=-1)
        torch.testing.assert_close(decoder([f]), c.norm(cosines).mT.unflatten(2, (4, 5)), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match='multiple of 64, got decoder_dim=100'): MaskTransformer([192], 3, dim=100)


def test_last_doubling_of_pup_is_left_to_others():
    model = create_segmenter('setrpup_vit_tiny_patch16_224', 3, decoder_dim=16, depth=1)
    decoder, f = model.decoder.double().eval(), torch.randn(1, 192, 3, 4, dtype=torch.float64)
    def double(x): return F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)
    with torch.no_grad():
        y = f
        for layer in decoder.layers: y = double(layer[-3:](y) if isinstance(layer[0], nn.Conv2d) else layer[1](y))
        torch.testing.assert_close(decoder.classify(y), double(decoder([f])), rtol=1e-10, atol=1e-10)


def test_config_makes_the_model_again():
    model = create_segmenter('segformer_mit_b0', 4, decoder_dim=32, last_stride=1, drop_path_rate=.1)
    again = create_segmenter(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.backbone.feature_info.reduction() == [4, 8, 16, 16] and isinstance(again, Segmenter)


def test_every_parameter_learns():
    model = create_segmenter('segformer_mit_b0', 4)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert not [n for n,p in model.named_parameters() if p.grad is None]


def test_errors(tmp_path):
    assert 'segformer_mit_b5' in list_segmenters()
    assert {'segformer_hrnet_w48', 'hrnet_hrnet_w48'} <= set(list_segmenters('hrnet_w48'))
    assert not {'deeplabv3plus_mit_b0', 'segmenter_resnet18', 'hrnet_resnet18', 'setr_mit_b0'} & set(list_segmenters())
    for name in ('deeplabv3plus_vit_tiny_patch16_224', 'deeplabv3plus_mit_b0', 'segmenter_resnet18', 'hrnet_resnet18',
                 'setr_swin_tiny_patch4_window7_224'):
        with pytest.raises(ValueError, match=f"no segmenter '{name}': .* is none of them"): create_segmenter(name, 2)
    with pytest.raises(ValueError, match="did you mean 'segmenter_vit_tiny_patch16_224'"):
        create_segmenter('segmentr_vit_tiny_patch16_224', 2)
    message = "cannot make features of 'resnet18' for deeplabv3plus with .*'output_stride': 7"
    with pytest.raises(ValueError, match=message):
        create_segmenter('deeplabv3plus_resnet18', 2, output_stride=7)
    with pytest.raises(ValueError, match='takes the last layer'):
        create_segmenter('setr_vit_tiny_patch16_224', 2, out_indices=(3,))
    with pytest.raises(ValueError, match='decoder_dim=64'):
        create_segmenter('linear_vit_tiny_patch16_224', 2, decoder_dim=64)
    with pytest.raises(ValueError, match="did you mean 'segformer_mit_b0'"): create_segmenter('segformr_mit_b0', 2)
    with pytest.raises(ValueError, match='no segmenter'): create_segmenter('', 2)
    with pytest.raises(ValueError, match="cannot make features of 'resnet18'.*last_stride"):
        create_segmenter('segformer_resnet18', 2, last_stride=1)
    with pytest.raises(ValueError, match='not both'):
        create_segmenter('segformer_mit_b0', 2, pretrained=True, weights='x')
    with pytest.raises(FileNotFoundError, match='gone.safetensors'):
        create_segmenter('segformer_mit_b0', 2, weights=tmp_path/'gone.safetensors')
    with pytest.raises(FileNotFoundError, match='gone.safetensors'):
        create_segmenter('segformer_resnet18', 2, weights=tmp_path/'gone.safetensors')


def test_other_backbones_weights_from_a_file(tmp_path):
    from safetensors.torch import save_file
    for name, kw, tensor, inside in [('segformer_resnet10t', {}, 'layer4.0.conv1.weight', ''),
                                     ('deeplabv3plus_resnet10t', {}, 'layer4.0.conv1.weight', ''),
                              ('segmenter_vit_tiny_patch16_224', dict(depth=1), 'blocks.0.mlp.fc1.weight', 'model.')]:
        state = timm.create_model(name.partition('_')[2], num_classes=5, **kw).state_dict()
        save_file(state, tmp_path/'w.safetensors')
        model = create_segmenter(name, 2, weights=tmp_path/'w.safetensors', **kw)
        assert torch.equal(model.backbone.state_dict()[inside+tensor], state[tensor])
