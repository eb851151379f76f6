"Segmenters: the decoder against its plain form and against transformers, names, odd backbones"
import pytest, torch, torch.nn.functional as F
from sasformer.segmenters import Segmenter, SegformerDecoder, create_segmenter, list_segmenters

channels,sizes = (8, 12, 20, 16),((13, 18), (7, 9), (4, 5), (2, 3))


def features(**kw): return [torch.randn(2, c, *s, **kw) for c,s in zip(channels, sizes)]


def plain_merge(decoder, feats):
    "Project, upsample, concatenate deepest first, fuse"
    levels = [F.interpolate(p(f), feats[0].shape[-2:], mode='bilinear', align_corners=False) for p,f in zip(decoder.project, feats)]
    return decoder.fuse(torch.cat(levels[::-1], 1))


def test_merge_is_the_plain_one():
    torch.manual_seed(0)
    decoder,feats = SegformerDecoder(channels, 5, dim=24),features(dtype=torch.float64, requires_grad=True)
    decoder.double()
    inputs = [*feats, decoder.fuse.weight, *decoder.project.parameters()]
    a,b = plain_merge(decoder, feats),decoder.merge(feats)
    weight = torch.randn_like(a)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for p,q in zip(torch.autograd.grad((a*weight).sum(), inputs), torch.autograd.grad((b*weight).sum(), inputs)):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_merge_in_mixed_precision():
    torch.manual_seed(0)
    decoder,feats = SegformerDecoder(channels, 5, dim=24).eval(),features()
    with torch.autocast('cpu', torch.bfloat16): y = decoder(feats)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), decoder(feats), rtol=.05, atol=.03)


def test_published_initialisation():
    torch.manual_seed(0)
    decoder = SegformerDecoder((32, 64, 160, 256), 21)
    assert abs(decoder.fuse.weight.std().item() - (2/256)**.5) < 1e-3   # He et al., by outputs
    assert decoder.fuse.bias is None and decoder.dropout.p == .1
    assert (decoder.norm.weight == 1).all() and (decoder.norm.bias == 0).all()


def test_segformer_of_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=7)).eval()
    head = theirs.decode_head
    for s in head.batch_norm.state_dict().values():
        if s.is_floating_point(): s.uniform_(.5, 1.5)
    theirs.save_pretrained(tmp_path)
    ours = create_segmenter('segformer_mit_b0', 7, weights=str(tmp_path)).eval()
    for p,q in zip(ours.decoder.project, head.linear_projections):
        p.load_state_dict(dict(weight=q.proj.weight[...,None,None], bias=q.proj.bias))
    for name,m in dict(fuse=head.linear_fuse, norm=head.batch_norm, classify=head.classifier).items():
        getattr(ours.decoder, name).load_state_dict(m.state_dict())
    for size in (64,64),(67,101):
        x = torch.randn(1, 3, *size)
        with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name,kw,stride', [
    ('resnet18', {}, 4), ('swin_tiny_patch4_window7_224', dict(img_size=64), 4), ('pvt_v2_b0', {}, 4),
    ('vit_tiny_patch16_224', dict(dynamic_img_size=True, out_indices=(3, 7, 11)), 16)])
def test_backbones(name, kw, stride):
    model = create_segmenter(f'segformer_{name}', 3, **kw).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64//stride, 64//stride)


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
    with pytest.raises(ValueError, match="did you mean 'segformer_mit_b0'"): create_segmenter('segformr_mit_b0', 2)
    with pytest.raises(ValueError, match='no segmenter'): create_segmenter('', 2)
    with pytest.raises(ValueError, match="cannot make features of 'resnet18'.*last_stride"): create_segmenter('segformer_resnet18', 2, last_stride=1)
    with pytest.raises(ValueError, match='not both'): create_segmenter('segformer_mit_b0', 2, pretrained=True, weights='x')
    with pytest.raises(FileNotFoundError, match='gone.safetensors'): create_segmenter('segformer_mit_b0', 2, weights=tmp_path/'gone.safetensors')
    with pytest.raises(FileNotFoundError, match='gone.safetensors'): create_segmenter('segformer_resnet18', 2, weights=tmp_path/'gone.safetensors')


def test_other_backbones_weights_from_a_file(tmp_path):
    import timm
    from safetensors.torch import save_file
    state = timm.create_model('resnet10t', num_classes=5).state_dict()
    save_file(state, tmp_path/'r.safetensors')
    model = create_segmenter('segformer_resnet10t', 2, weights=tmp_path/'r.safetensors')
    torch.testing.assert_close(model.backbone.state_dict()['layer4.0.conv1.weight'], state['layer4.0.conv1.weight'])
