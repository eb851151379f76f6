"Attention from plain products: what it takes, its memory, and the affinity loss along the maps it keeps"
import copy, gc, pytest, torch, weakref
from conftest import rounding
from torch.nn import functional as F
from sasformer.sasformer import Form, affinity_loss, combine
from sasformer.annotations import UNLABELLED
from sasformer.attention import AttentionTap, attention_map, recording
from sasformer.quick import AttentionMap, BufferPool, QuickAttention, _Attention, can_be_quick, propagate_kept
from sasformer.segmenters import create_segmenter


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_segmenter('segformer_mit_b0', 5, last_stride=1, decoder_dim=32, dropout=0.).eval()


def target(): return torch.randint(0, 5, (2, 64, 64)).where(torch.rand(2, 64, 64) < .05, torch.tensor(UNLABELLED))


def loss_of(model, x, y, context, form=Form(), **kw):
    with AttentionTap(model) as tap, context: out = model(x)
    return out.square().mean()+10*combine(affinity_loss(tap.blocks, out, y, form, **kw))


def gradient(loss, model, **kw):
    grads = torch.autograd.grad(loss, model.parameters(), allow_unused=True, **kw)
    return torch.cat([g.flatten() for g in grads if g is not None])


def plain(model, x, y, form=Form()):
    kept = lambda layers, p: attention_map(layers) @ p
    return gradient(loss_of(model, x, y, torch.enable_grad(), form, propagation=kept), model)


def close(model, x, y, *gradients, form=Form(), seed=None):
    "`gradients` are the plain loss's but for rounding: as far off as the plain ones are from the network's in float64"
    def expected(model, x):
        if seed is not None: torch.manual_seed(seed)
        return plain(model, x, y, form)
    b = expected(model, x)
    eps = rounding(b, expected(copy.deepcopy(model).double(), x.double()))
    for a in gradients: assert (a-b).abs().max() <= eps


def test_two_forward_passes_before_their_backward_passes(model):
    "As in gradient accumulation: the second must not write into the maps of the first"
    quick, xs, ys = QuickAttention(), torch.randn(2, 2, 3, 64, 64), [target(), target()]
    losses = [loss_of(model, x, y, quick) for x,y in zip(xs, ys)]
    for loss, x, y in zip(losses, xs, ys): close(model, x, y, gradient(loss, model))


def test_backward_twice(model):
    "The maps are given back in the first backward pass and made again in the second"
    x, y, quick = torch.randn(2, 3, 64, 64), target(), QuickAttention()
    loss = loss_of(model, x, y, quick)
    first = gradient(loss, model, retain_graph=True)
    loss_of(model, x+1, y, quick)   # writes into the same memory
    close(model, x, y, first, gradient(loss, model))


def test_memory_is_used_again_and_bounded(model):
    x, y, quick = torch.randn(2, 3, 64, 64), target(), QuickAttention(.2)
    pool = quick.pool
    for n in (2, 1, 2):
        loss = loss_of(model, x[:n], y[:n], quick)
        assert 0 < pool.taken <= .2*2**20
        del loss; gc.collect()
        assert pool.taken == sum(size*len(o) for size, o in pool.free.items())   # also without a backward pass


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_what_it_passes_on(dtype, monkeypatch):
    from sasformer import quick
    taken = []
    monkeypatch.setattr(quick.QuickAttention, '_attend', lambda self, q, *a: taken.append(q.dtype) or q)
    q = torch.randn(1, 2, 5, 8, dtype=dtype, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    with quick.QuickAttention(bf16=True):
        for kw in (dict(is_causal=True), dict(attn_mask=mask), dict(dropout_p=.1)):
            F.scaled_dot_product_attention(q, q, q, **kw)
        F.scaled_dot_product_attention(q, q, q, mask)
        F.scaled_dot_product_attention(q[0], q[0], q[0])
        F.scaled_dot_product_attention(q[:0], q[:0], q[:0])   # an empty batch
        F.scaled_dot_product_attention(q, q[:,:1].expand(-1, 2, -1, -1)[:,:1], q[:,:1], enable_gqa=True)
        assert not taken
        F.scaled_dot_product_attention(q, q, q, dropout_p=0., scale=.5)
    assert len(taken) == (dtype == torch.bfloat16)


@pytest.mark.parametrize('layers,heads', [(2, 1), (2, 8), (40, 5)])
@pytest.mark.parametrize('mb', [0, 100])
def test_bfloat16_is_rounded_once(layers, heads, mb):
    "However many maps are added up: class scores that sum to 1 still do, and differ from float32 by about one rounding"
    torch.manual_seed(0)
    rand = lambda n: torch.randn(2, heads, n, 16).bfloat16()
    qk, pool = [(rand(64), rand(32)) for _ in range(layers)], BufferPool(mb)
    p = torch.rand(2, 32, 4).softmax(-1).requires_grad_()
    maps = []
    for q, k in qk:
        m = AttentionMap(q, k, .25, pool)
        maps.append((m, _Attention.apply(q.requires_grad_(), k, k, m)[1]))
    y = propagate_kept(maps, p)
    plain = torch.cat([(q.float() @ k.float().mT*.25).softmax(-1) for q,k in qk], 1).mean(1) @ p
    g = torch.randn_like(y)
    a, b = (torch.autograd.grad(o, p, g)[0] for o in (y, plain))
    once = torch.finfo(torch.bfloat16).eps/2   # the largest relative error of one rounding
    assert (y.sum(-1)-1).abs().max() < once and (y-plain).abs().max() < once/2   # values up to a half or so
    assert (a-b).norm() < once*b.norm()


@pytest.mark.parametrize('mb', [0, 160])
def test_a_share_without_positions(model, mb):
    "In a block with fewer positions than 1/share most draws are empty"
    x, y, quick = torch.randn(2, 3, 64, 64), target(), QuickAttention(mb)
    for seed in range(4):
        torch.manual_seed(seed)
        loss = loss_of(model, x, y, quick, Form(fraction=1/30))
        first = gradient(loss, model, retain_graph=True)
        again = gradient(loss, model)   # the maps are made again
        close(model, x, y, first, again, form=Form(fraction=1/30), seed=seed)


def test_a_forward_pass_that_breaks_off_leaves_nothing(model):
    x = torch.randn(2, 3, 64, 64)
    class Stop(Exception): pass
    def stop(*_): raise Stop()
    flat = hasattr(model.backbone, 'stages_1')
    layer = model.backbone.get_submodule('stages_1') if flat else model.backbone.stages[1]
    handle = layer.blocks[0].attn.proj.register_forward_pre_hook(stop)
    with AttentionTap(model), pytest.raises(Stop), QuickAttention(): model(x)
    handle.remove()
    assert recording.layer is None
    with QuickAttention(), torch.no_grad(): assert torch.equal(model(x), model(x))


def test_a_learner_uses_it(monkeypatch):
    "In training, with the affinity loss and without; the context is left"
    from sasformer import quick
    from sasformer.sasformer import SASFormerLoss
    from sasformer.data import sparse_dataloaders
    from sasformer.datasets import scenes
    from sasformer.learner import sparse_learner
    calls, plain = [], quick._backward
    monkeypatch.setattr(quick, '_backward', lambda *a, **k: calls.append(a[0].dtype) or plain(*a, **k))
    dls = sparse_dataloaders(scenes(n_train=8, n_val=1, size=64), 'point', (32, 32), 2)
    dls.train.n = 2
    monkeypatch.setattr(quick, 'cpu_multiplies_bf16', lambda: True)   # or it would leave bfloat16 to the fused kernel
    cases = ('fp32', None, 0), ('fp32', SASFormerLoss(), 8), ('bf16', None, 8), ('bf16', SASFormerLoss(), 8)
    for precision, method, expected in cases:
        calls.clear()
        learn = sparse_learner(dls, 'segformer_mit_b0', method, precision=precision)
        with learn.no_logging(): learn.fit(1)
        assert len(calls) == expected
        assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('frozen', [False, True])
def test_nothing_is_held_after_a_step(precision, frozen, monkeypatch):
    "No map is alive when the next forward pass begins"
    from fastai.callback.core import Callback
    from sasformer import quick
    from sasformer.sasformer import SASFormerLoss
    from sasformer.data import sparse_dataloaders
    from sasformer.datasets import scenes
    from sasformer.learner import sparse_learner
    monkeypatch.setattr(quick, 'cpu_multiplies_bf16', lambda: True)
    alive, maps, init = [], weakref.WeakSet(), AttentionMap.__init__
    monkeypatch.setattr(AttentionMap, '__init__', lambda self, *a: maps.add(self) or init(self, *a))
    class Look(Callback):
        def before_batch(self):
            gc.collect()
            alive.append(len(maps))
        def after_pred(self): alive.append(len(maps))
    dls = sparse_dataloaders(scenes(n_train=8, n_val=1, size=64), 'point', (32, 32), 2)
    dls.train.n = 6
    learn = sparse_learner(dls, 'segformer_mit_b0', SASFormerLoss(), precision=precision, cbs=Look(), validate_every=2)
    for p in learn.model.backbone.parameters(): p.requires_grad_(not frozen)
    with learn.no_logging(): learn.fit(1)
    assert alive[:6] == [0, 8]*3


def test_checkpointed_and_compiled_models_are_left_alone(model):
    assert can_be_quick(model)
    assert not can_be_quick(torch.compile(model, backend='eager'))
    model.backbone.set_grad_checkpointing()
    assert not can_be_quick(model)
