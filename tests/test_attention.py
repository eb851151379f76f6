"AttentionTap: exact, without a trace on the model, and right in training"
import gc, weakref
import pytest, timm, timm.layers, torch
from torch import nn
import sasformer.mit
from sasformer.attention import AttentionTap, attention_from, attention_map
from sasformer.segmenters import create_segmenter

vit = dict(img_size=64, embed_dim=48, depth=4, num_heads=3)
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
eps = torch.finfo(torch.float32).eps


def softmax_rounding(layers):
    "What float32 may make of `attention_map`: 8 times the rounding of the largest product of a query and a key"
    return 8*eps*max(1., *((l.q.norm(dim=-1).max()*l.k.norm(dim=-1).max()*l.scale).item() for l in layers))


def mit(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('mit_b0', **dict(dict(num_classes=0), **kwargs))


def n_hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize('name, kwargs', [
    ('mit_b0', {}), ('mit_b0', dict(features_only=True, last_stride=1)), ('pvt_v2_b0', {}), ('pvt_v2_b2_li', {}),
    ('vit_tiny_patch16_224', vit),
    ('vit_tiny_patch16_224', vit | dict(qk_norm=True, class_token=False, global_pool='avg')),
    ('vit_tiny_patch16_224', vit | dict(features_only=True)), ('deit_tiny_distilled_patch16_224', vit),
    ('vit_small_patch14_reg4_dinov2', vit | dict(patch_size=8)),
    ('eva02_tiny_patch14_224', vit | dict(patch_size=8)), ('vit_small_patch16_rope_mixed_224', vit),
    ('vit_small_patch16_dinov3', vit | dict(features_only=True))])
def test_equals_own_attention(name, kwargs):
    model, maps = timm.create_model(name, **kwargs).double().eval(), []   # float64: what differs there is no rounding
    for p in model.parameters(): nn.init.normal_(p, std=.2)
    tap = AttentionTap(model)
    for a, _ in tap._attention:
        a.fused_attn = False
        a.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    with torch.no_grad(), tap: model(x.double())
    for l, a in zip(tap.layers, maps, strict=True):
        torch.testing.assert_close((l.q @ l.k.transpose(-2, -1) * l.scale).softmax(-1), a, atol=1e-10, rtol=0)
        assert l.q.shape[2] == l.prefix + l.q_size[0] * l.q_size[1]
        assert l.k.shape[2] == l.prefix + l.k_size[0] * l.k_size[1]
    assert list(tap.blocks) == [1, 2, 3, 4]
    layers = tap.blocks[4]
    image = [a[..., layers[0].prefix:, layers[0].prefix:] for a in maps[-len(layers):]]
    A = attention_map(layers)
    expected, atol = sum((a / a.sum(-1, keepdim=True)).mean(1) for a in image) / len(layers), softmax_rounding(layers)
    torch.testing.assert_close(A.double(), expected, atol=atol, rtol=0)
    (h, w), i = layers[0].q_size, layers[0].q_size[1] * (layers[0].q_size[0] // 2)
    torch.testing.assert_close(attention_from(layers, .5, 0).flatten(1), A[:, i], atol=atol, rtol=0)


def test_leaves_no_trace():
    model = mit().eval()
    before, tap = model(x), AttentionTap(model)
    with tap: during = model(x)
    assert n_hooks(model) == 0 and torch.equal(before, during) and torch.equal(before, model(x))
    assert tap.on() is tap and tap.on() is tap and n_hooks(model) == 1 + 8 * 4
    model(x)
    assert len(tap.layers) == 8   # the last forward pass only
    tap.off()
    held = [weakref.ref(t) for l in tap.layers for t in (l.q, l.k)]
    tap.clear()
    del during
    gc.collect()
    assert len(held) == 16 and not any(r() is not None for r in held)


def test_odd_sizes():
    with AttentionTap(mit(last_stride=1)) as tap: tap.model(torch.randn(1, 3, 75, 97))
    assert [(tap.blocks[b][0].q_size, tap.blocks[b][0].k_size) for b in range(1, 5)] == [
        ((19, 25), (2, 3)), ((10, 13), (2, 3)), ((5, 7), (2, 3)), ((5, 7), (5, 7))]
    for l in tap.layers: assert l.q.shape[2] == l.q_size[0] * l.q_size[1] and l.k.shape[2] == l.k_size[0] * l.k_size[1]


def test_blocks_and_groups():
    with AttentionTap(mit(), blocks=[2, 3]) as tap: tap.model(x)
    assert [l.block for l in tap.layers] == [2, 2, 3, 3]
    model = timm.create_model('vit_tiny_patch16_224', **vit | dict(depth=5))
    for groups, blocks in [(1, [1] * 5), (4, [1, 1, 2, 3, 4]), (5, [1, 2, 3, 4, 5])]:
        assert [b for _, b in AttentionTap(model, groups=groups)._attention] == blocks
    with pytest.raises(ValueError, match='expected 1 to 5'): AttentionTap(model, groups=6)
    with pytest.raises(ValueError, match='expected 1 to 4'): AttentionTap(model, blocks=[0])


def test_mask_transformer():
    "Block 4 of a Segmenter: its own attention, class tokens (behind the patches) left out, rows normalised again"
    torch.manual_seed(0)
    model, maps = create_segmenter('segmenter_vit_tiny_patch16_224', 5, depth=4).double().eval(), []
    for p in model.parameters(): nn.init.normal_(p, std=.2)
    with torch.no_grad(), AttentionTap(model) as tap: model(x.double())
    assert list(tap.blocks) == [1, 2, 3, 4] and tap.n_blocks == 4   # not unless asked for
    tap = AttentionTap(model, blocks=range(1, 6))
    for layer in model.decoder.blocks:
        layer.attn.fused_attn = False
        layer.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    with torch.no_grad(), tap: model(torch.randn(2, 3, 60, 75, dtype=torch.float64))
    layers = tap.blocks[5]
    assert len(tap.layers) == 6
    assert [l.prefix for l in tap.layers] == [1, 1, 1, 1, 0, 0]
    assert layers[0].q.shape == (2, 3, 20, 64)
    assert maps[0].shape == (2, 3, 25, 25) and layers[0].q_size == layers[0].k_size == (4, 5)
    explicit = sum((a[..., :20, :20] / a[..., :20, :20].sum(-1, keepdim=True)).mean(1) for a in maps) / 2
    torch.testing.assert_close(attention_map(layers).double(), explicit, atol=softmax_rounding(layers), rtol=0)
    with pytest.raises(ValueError, match='expected 1 to 5'): AttentionTap(model, blocks=[6])
    model.train()
    with AttentionTap(model, blocks=[5]) as tap: model(x.double())
    attention_map(tap.blocks[5]).square().sum().backward()
    assert model.decoder.blocks[1].attn.qkv.weight.grad.abs().max() > 0
    assert model.backbone.model.blocks[3].attn.qkv.weight.grad is not None


@pytest.mark.parametrize('name, blocks', [('segmenter', (1, 2, 3, 4, 5)), ('setr', None)])
def test_affinity_loss_on_vits(name, blocks):
    from fastai.vision.all import DataLoader, DataLoaders, Learner
    from sasformer.sasformer import SASFormerLoss, Form, propagate
    torch.manual_seed(0)
    model, labels = create_segmenter(f'{name}_vit_tiny_patch16_224', 3, depth=4), torch.full((64, 80), 255)
    labels[:20, :20] = 1
    dl = DataLoader([(image, labels) for image in torch.randn(4, 3, 64, 80)], bs=2)
    def loss(y, t):
        y = nn.functional.interpolate(y, t.shape[-2:], mode='bilinear')
        return nn.functional.cross_entropy(y, t, ignore_index=255)
    learn = Learner(DataLoaders(dl, dl), model, loss, cbs=SASFormerLoss(form=Form(blocks=blocks)))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    values = learn.sasformer_loss.epochs[0]
    assert list(values) == [f'aff{b}' for b in blocks or range(1, 5)]
    assert all(v > 0 for v in values.values())
    assert n_hooks(model) == 0
    with torch.no_grad(), AttentionTap(model, blocks) as tap: y = model(x)
    p = y.softmax(1).flatten(2).mT
    for layers in tap.blocks.values():
        exact = attention_map(layers) @ p
        torch.testing.assert_close(propagate(layers, p), exact, atol=softmax_rounding(layers), rtol=0)


def gradients(model, clear=True):
    model.train()
    with AttentionTap(model) as tap:
        out = model(x)
        loss = sum(attention_map(layers).square().sum() for layers in tap.blocks.values()) + out.square().mean()
        if clear: tap.clear()
        loss.backward()
        assert not clear or not tap.layers and not tap._seen
    return len(tap.layers), [p.grad for p in model.parameters()]


@pytest.mark.parametrize('make', [mit, lambda: timm.create_model('vit_tiny_patch16_224', num_classes=0, **vit)])
def test_gradient_checkpointing(make):
    model = make()
    _, plain = gradients(model)
    model.zero_grad()
    model.set_grad_checkpointing(True)
    n, replayed = gradients(model, clear=False)
    assert n == len(AttentionTap(model)._attention)   # what the backward pass replays is not heard
    assert any(g.abs().max() > 0 for g in plain)
    for a, b in zip(plain, replayed): torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with AttentionTap(model), pytest.raises(RuntimeError, match='re-entrant gradient checkpointing'): model(x)
    finally: timm.layers.set_reentrant_ckpt(False)
    assert n_hooks(model) == 0


def test_gradient_reaches_projections():
    model = mit().train()
    with AttentionTap(model) as tap: model(x)
    attention_map(tap.blocks[3]).square().sum().backward()
    attn = model.stages[2].blocks[1].attn
    assert attn.q.weight.grad.abs().max() > 0
    keys, values = attn.kv.weight.grad.chunk(2)
    assert keys.abs().max() > 0 and values.abs().max() == 0


def test_autocast():
    with torch.autocast('cpu', torch.bfloat16), AttentionTap(mit().train()) as tap:
        tap.model(x)
        A = attention_map(tap.blocks[1])
    assert tap.layers[0].q.dtype == torch.bfloat16 and A.dtype == torch.float32
    torch.testing.assert_close(A.sum(-1), torch.ones(2, 256), atol=16*eps, rtol=0)   # sums of 4, over 2 layers


def test_distributed(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        plain = gradients(mit())[1]
        wrapped = nn.parallel.DistributedDataParallel(mit())
        for a, b in zip(plain, gradients(wrapped)[1]): torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    finally: torch.distributed.destroy_process_group()


def test_compile():
    for compiled in (torch.compile(mit(), backend='eager'), nn.Sequential(torch.compile(mit(), backend='eager'))):
        with pytest.raises(RuntimeError, match='the model is compiled'): AttentionTap(compiled).on()
    model = timm.create_model('vit_tiny_patch16_224', **vit | dict(depth=1)).eval()
    with torch.no_grad(), AttentionTap(model, groups=1) as tap:
        expected = model(x)
        layers = tap.layers
        got = torch.compile(model, backend='eager')(x)
        assert torch.equal(got, expected)   # the same kernels, called from elsewhere
        for a, b in zip(tap.layers, layers, strict=True): assert torch.equal(a.q, b.q)
    model.compile(backend='eager')
    with pytest.raises(RuntimeError, match='the model is compiled'): AttentionTap(model, groups=1).on()


def test_refuses():
    for name in ('swin_tiny_patch4_window7_224', 'beit_base_patch16_224', 'resnet18', 'vit_relpos_small_patch16_224'):
        with torch.device('meta'): model = timm.create_model(name)
        with pytest.raises(TypeError, match='cannot be read from this model. Works with: MiT'): AttentionTap(model)
    with pytest.raises(TypeError, match='2 transformers'): AttentionTap(nn.Sequential(mit(), mit()))
    with pytest.raises(RuntimeError, match='DataParallel'): AttentionTap(nn.DataParallel(mit())).on()
    dropping = timm.create_model('vit_tiny_patch16_224', patch_drop_rate=.5, **vit)
    with AttentionTap(dropping.train()), pytest.raises(RuntimeError, match='patch dropout'): dropping(x)
    with AttentionTap(mit()) as tap: tap.model(x)
    with pytest.raises(ValueError, match='different sizes'): attention_map(tap.layers)
    with pytest.raises(ValueError, match='no layers'): attention_map([])


def test_survives_a_failed_forward():
    model = mit().eval()
    with AttentionTap(model) as tap:
        with pytest.raises(RuntimeError): model(torch.randn(1, 3, 16, 16))   # too small for the sequence reduction
        model(x)
    assert len(tap.layers) == 8
