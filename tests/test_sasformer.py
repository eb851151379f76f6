"The affinity loss without maps against autograd through built maps: threads, padding, precision, sampling"
import pytest, torch
from sasformer.annotations import PADDING, UNLABELLED
from torch.nn import functional as F
from sasformer.sasformer import SASFormerLoss, Form, _DoubleL1, affinity_loss, combine, counted_positions
from sasformer.attention import QK, attention_map


def maps(layers, p): return attention_map(layers) @ p


def case(B=3, C=5, layers=2, heads=3, q_size=(24, 20), k_size=(6, 5), prefix=0, dtype=torch.float32, labelled=.05):
    torch.manual_seed(0)
    rand = lambda n: torch.randn(B, n, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    M, K = (prefix+a*b for a, b in (q_size, k_size))
    blocks = {1: [QK(rand(M), rand(K), 8**-.5, q_size, k_size, 1, prefix) for _ in range(layers)]}
    target = torch.randint(0, C, (B, 96, 80)).where(torch.rand(B, 96, 80) < labelled, torch.tensor(UNLABELLED))
    logits = (3*torch.randn(B, C, 24, 20)).requires_grad_()
    return blocks, logits, target


def value_and_gradients(blocks, logits, target, form=Form(), propagation=None):
    loss = combine(affinity_loss(blocks, logits, target, form, propagation))
    return loss.detach(), *torch.autograd.grad(loss, [logits, *(t for o in blocks[1] for t in (o.q, o.k))])


def close(a, b, eps=1e-5):
    for x, y in zip(a, b): assert (x-y).abs().max() <= eps*y.abs().max()


@pytest.fixture(params=[1,2,3])
def threads(request):
    n = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(n)


@pytest.mark.parametrize('kw', [
    {}, dict(B=1), dict(B=5, C=2), dict(C=150), dict(prefix=2, q_size=(6, 5)),
    dict(q_size=(96, 80), k_size=(24, 20), heads=5, B=2)])
def test_equals_maps(threads, kw):
    c = case(**kw)
    close(value_and_gradients(*c), value_and_gradients(*c, propagation=maps))


def test_same_numbers_every_time(threads):
    c = case(q_size=(48, 40), k_size=(24, 20), B=1)
    first = value_and_gradients(*c)
    for _ in range(3): assert all(torch.equal(a, b) for a, b in zip(first, value_and_gradients(*c)))


@pytest.mark.parametrize('classes', [2, 150])
def test_threads_do_not_change_the_numbers(classes):
    torch.manual_seed(0)
    n, seen = torch.get_num_threads(), []
    y, p, on = torch.rand(3, 40, classes), torch.rand(3, 80, classes)[:,::2], torch.rand(3, 80)[:,::2] < .5
    y, p = y.requires_grad_(), p.detach().requires_grad_()   # p and on with gaps
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        value = _DoubleL1.apply(y, p, on)
        seen.append([value, *torch.autograd.grad(value, (y, p))])
    torch.set_num_threads(n)
    for other in seen[1:]: assert all(torch.equal(a, b) for a, b in zip(seen[0], other))
    assert (seen[0][1][~on] == 0).all() and (seen[0][2][~on] == 0).all()


def test_distance_without_positions():
    y, p = (torch.rand(2, 0, 5, requires_grad=True) for _ in 'yp')
    value = _DoubleL1.apply(y, p, torch.ones(2, 0, dtype=torch.bool))
    assert value == 0 and [g.shape for g in torch.autograd.grad(value, (y, p))] == [y.shape, p.shape]


def test_padding_is_left_out():
    blocks, logits, target = case()
    target[1:, 30:], target[0] = PADDING, PADDING   # nothing of the first image
    close(value_and_gradients(blocks, logits, target), value_and_gradients(blocks, logits, target, propagation=maps))
    target[:] = PADDING
    assert all((o == 0).all() for o in value_and_gradients(blocks, logits, target))


def test_bfloat16():
    c = case(dtype=torch.bfloat16)
    loss, *grads = value_and_gradients(*c)
    plain, *expected = value_and_gradients(*c, propagation=maps)
    assert abs(loss-plain) < .002*plain
    for a, b in zip(grads, expected): assert (a-b).float().norm() < .05*b.float().norm()


@pytest.mark.parametrize('rows', ['unlabelled', 'all'])
def test_a_share_has_no_bias(rows):
    c = case(q_size=(12, 10), k_size=(3, 3), B=2)
    c[2][1, 50:] = PADDING   # fewer positions count in the second image
    exact = value_and_gradients(*c, Form(positions=rows))
    draws = [value_and_gradients(*c, Form(positions=rows, fraction=.25)) for _ in range(400)]
    for e, *d in zip(exact, *draws):
        d = torch.stack(d)
        assert ((d.mean(0)-e).abs() <= 5*d.std(0)/len(draws)**.5+1e-7).float().mean() > .999
    assert torch.stack([d[0] for d in draws]).std() > 0
    torch.manual_seed(3)
    a = value_and_gradients(*c, Form(fraction=.5))
    torch.manual_seed(3)
    close(a, value_and_gradients(*c, Form(fraction=.5), maps))   # the same draw


def test_not_a_number_stays():
    blocks, logits, target = case()
    with torch.no_grad(): blocks[1][0].q[0,0,0,0] = float('nan')
    assert combine(affinity_loss(blocks, logits, target)).isnan()


def test_backward_twice():
    blocks, logits, target = case()
    loss = combine(affinity_loss(blocks, logits, target))
    first, = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


def test_tap_is_empty_before_the_backward_pass():
    from sasformer.benchmarks import get_source
    from sasformer.data import sparse_dataloaders
    from sasformer.learner import sparse_learner
    from fastai.callback.core import Callback, CancelFitException
    seen = []
    class Look(Callback):
        def before_backward(self):
            seen.append((len(self.learn.sasformer_loss.tap.layers), len(self.learn.sasformer_loss._sums)))
            raise CancelFitException()
    dls = sparse_dataloaders(get_source('scenes'), 'point', (64, 64), 2)
    learn = sparse_learner(dls, 'segformer_mit_b0', SASFormerLoss(), cbs=Look())
    learn.fit(1)
    assert seen == [(0, 4)]   # four terms were computed, and nothing is held


@pytest.mark.parametrize('shape,size', [
    ((251, 333), (64, 64)), ((251, 333), (37, 51)), ((251, 333), (7, 300)),
    ((256, 320), (64, 80)), ((256, 320), (32, 300))])
def test_counted_rows_are_the_nearest(shape, size):
    target = torch.where(torch.rand(2, *shape) < .3, 7, UNLABELLED)
    target[:,100:] = PADDING
    nearest = F.interpolate(target[:,None].float(), size, mode='nearest').flatten(1)
    assert torch.equal(counted_positions(target, size, 'unlabelled'), nearest == UNLABELLED)
    assert torch.equal(counted_positions(target, size, 'all'), nearest != PADDING)
