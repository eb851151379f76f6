"What every additional loss shares: weight, terms, what it needs, several at once, several processes, interruptions"
import math

import pytest, torch, torch.distributed as dist
from conftest import connected, fork_two
from fastai.vision.all import Callback, CancelFitException, CancelTrainException, Learner, SGD
from sasformer.data import sparse_dataloaders
from sasformer.datasets import scenes
from sasformer.learner import PlainTensors, partial_cross_entropy, sparse_learner
from sasformer.sasformer import Form, SASFormerLoss
from sasformer.segmenters import create_segmenter
from sasformer.tel import TreeEnergyLoss
from sasformer.terms import LossTerm
from torch import nn


class Confidence(LossTerm):
    "Two terms of the prediction alone"
    def terms(self):
        P = self.logits.softmax(1)
        return dict(square=P.square().sum(1).mean(), top=P.amax(1).mean())


class Other(Confidence):
    def terms(self): return dict(other=self.logits.tanh().mean()+2)


class Watch(Callback):
    "The loss of each step, its labelled part, and the gradient of the scores"
    order, run_valid = 30, False
    def before_fit(self): self.total, self.labelled, self.grads, self.own = [], [], [], []
    def after_pred(self):
        if self.pred.requires_grad: self.pred.register_hook(lambda g: self.grads.append(g.clone()))
    def after_loss(self):
        self.total.append(self.loss.item())
        self.labelled.append(partial_cross_entropy(self.pred, self.learn.yb[0]).item())
        if not hasattr(self.learn, 'confidence'): return self.own.append(None)
        self.own.append(torch.stack(list(Confidence.terms(self.learn.confidence).values())).tolist())


@pytest.fixture(scope='module')
def dls(): return sparse_dataloaders(scenes(n_train=8, n_val=4, size=32), 'scribble', size=32, bs=4, device='cpu')


def make(dls, *cbs, name='segformer_mit_b0', **kwargs):
    torch.manual_seed(0)
    model = create_segmenter(name, len(dls.vocab), **{**dict(decoder_dim=16, dropout=0.), **kwargs})
    return Learner(dls, model, partial_cross_entropy, opt_func=SGD, lr=1e-2, cbs=[PlainTensors(), *cbs])


def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)
    return learn


@pytest.mark.parametrize('start,warmup,expected', [
    (0, 0, [2]*8), (.5, 0, [0]*4+[2]*4), (.25, .5, [0, 0, 0, .5, 1, 1.5, 2, 2]),
    (0, 1, [t/4 for t in range(8)]), (1, 0, [0]*8)])
def test_weight(dls, start, warmup, expected):
    seen = []
    class See(Callback):
        run_valid = False
        def after_loss(self): seen.append(self.confidence.weight_now)
    fit(make(dls, Confidence(2, start, warmup), See()), 4)
    assert seen == pytest.approx(expected, abs=1e-12)


def test_loss_and_epochs(dls):
    "The loss is the labelled part plus weight · terms; epochs keep the terms' means by name, none at weight 0"
    learn = fit(make(dls, Confidence(2., start=.5), watch := Watch()), 4)
    n = len(watch.total)//4
    for i, (total, labelled, own) in enumerate(zip(watch.total, watch.labelled, watch.own)):
        assert total == (labelled if i < 2*n else pytest.approx(labelled+2*sum(own), rel=1e-6))
    epochs = learn.confidence.epochs
    assert epochs[:2] == [{}, {}]
    assert list(epochs[3]) == ['square', 'top']
    assert learn.confidence.epoch_values == epochs[3]
    for e in (2, 3):
        means = torch.tensor(watch.own[e*n:(e+1)*n]).mean(0)
        assert list(epochs[e].values()) == pytest.approx(means.tolist(), rel=1e-6)
    assert len(fit(learn).confidence.epochs) == 1   # a new fit begins anew


def test_weight_zero_changes_no_bit(dls):
    bare, zero = (fit(make(dls, *cbs), 2).model.state_dict() for cbs in ((), (Confidence(0.),)))
    assert all(torch.equal(bare[k], zero[k]) for k in bare)


def test_default_labelled_weight_changes_no_bit(dls):
    class Sum(Callback):
        "The same by hand"
        order, run_valid = 9, False
        def after_loss(self):
            P = self.pred.softmax(1)
            terms = torch.stack([P.square().sum(1).mean(), P.amax(1).mean()])
            self.learn.loss_grad = self.loss_grad + .3*terms.sum()
            self.learn.loss = self.loss_grad.detach().clone()
    a, b = (fit(make(dls, cb), 2).model.state_dict() for cb in (Confidence(.3), Sum()))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('weights', [(0., 1.), (1., 0.), (.5, 1.), (.5, .5), (0., 0.)])
def test_labelled_weight(dls, weights):
    "Of the labelled loss alone, whatever the order of the methods"
    a, b = Confidence(2.), Other(3.)
    a.labelled_weight, b.labelled_weight = weights
    learn = fit(make(dls, a, b, watch := Watch()))
    terms = [2*sum(a.epochs[0].values()), 3*b.epochs[0]['other']]
    expected = math.prod(weights)*sum(watch.labelled)/len(watch.labelled) + sum(terms)
    assert sum(watch.total)/len(watch.total) == pytest.approx(expected, rel=1e-5)


def test_labelled_weight_zero_has_no_gradient_of_the_labels(dls):
    "Not even where the labelled loss is no number"
    class Broken(Callback):
        order, run_valid = 4, False
        def after_loss(self): self.learn.loss_grad = self.loss_grad*float('nan')
    a = Confidence(2.)
    a.labelled_weight = 0.
    fit(make(dls, a, Broken(), watch := Watch()))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in watch.grads)
    assert all(math.isfinite(t) for t in watch.total)


def test_labelled_weight_waits_for_start(dls):
    a = Confidence(2., start=.5)
    a.labelled_weight = 0.
    fit(make(dls, a, watch := Watch()), 2)
    n = len(watch.total)//2
    assert watch.total[:n] == watch.labelled[:n]
    for total, own in zip(watch.total[n:], watch.own[n:]): assert total == pytest.approx(2*sum(own), rel=1e-6)


def test_never_in_validation(dls):
    calls = []
    class Count(Confidence):
        def terms(self):
            calls.append(self.model.training)
            return super().terms()
    learn = fit(make(dls, Count()))
    with learn.no_bar(): learn.get_preds(); learn.validate()
    assert calls == [True]*len(dls.train)


def test_precision(dls):
    "Layers of the method's own run in the network's precision, its terms in float32"
    seen = {}
    class Look(Confidence):
        def prepare(self): seen['prepare'] = torch.is_autocast_enabled('cpu')
        def terms(self):
            product = self.logits.flatten(1) @ self.logits.flatten(1).T
            seen['terms'] = torch.is_autocast_enabled('cpu'), self.logits.dtype, product.dtype
            return super().terms()
    learn = sparse_learner(dls, 'segformer_mit_b0', Look(), decoder_dim=16, precision='bf16')
    class Stop(Callback):
        order = 50
        def after_loss(self): raise CancelFitException
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Stop())
    assert seen == dict(prepare=True, terms=(False, torch.float32, torch.float32))


def test_images(dls):
    "In [0, 1], whatever the network's normalisation"
    seen = []
    class Look(Confidence):
        def terms(self): seen.append((self.x, self.images)); return super().terms()
    fit(sparse_learner(dls, 'segformer_mit_b0', Look(), decoder_dim=16))
    for x, images in seen:
        assert type(images) is torch.Tensor and images.dtype == torch.float32 and images.shape == x.shape
        # bytes they were; the rounding is some 255 eps
        assert (images*255-(images*255).round()).abs().max() < 1e-3 and x.min() < -.5
        assert -1e-5 < images.min() and images.max() < 1+1e-5


def test_labels_and_tags(dls):
    method = Confidence()
    plain = torch.zeros(2, 4, 4, dtype=torch.long), torch.ones(2, 5)
    method.learn = type('Learn', (), dict(yb=plain[:1]))()
    assert method.label_map is not None and method.label_map.shape == (2, 4, 4) and method.tags is None
    method.learn = type('Learn', (), dict(yb=plain))()
    assert torch.equal(method.label_map, plain[0]) and torch.equal(method.tags, plain[1])


class Backwards(Confidence):
    def sample_order(self, dataset): return list(range(len(dataset)))[::-1]


def test_sample_order(dls, monkeypatch):
    "That of the method while its learner trains, interrupted or not, and the loader's own before and after"
    seen, load = [], dls.train.dataset.load
    monkeypatch.setattr(dls.train.dataset, 'load', lambda i: seen.append(i) or load(i))
    learn = sparse_learner(dls, 'segformer_mit_b0', Backwards(), decoder_dim=16)
    assert dls.train.order is None
    fit(learn)
    assert seen == [7, 6, 5, 4, 3, 2, 1, 0] and dls.train.order is None
    class Stop(Callback):
        order, run_valid = 50, False
        def after_loss(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Stop())
    assert dls.train.order is None
    seen.clear()
    fit(sparse_learner(dls, 'segformer_mit_b0', Confidence(), decoder_dim=16))
    assert sorted(seen) == list(range(8)) and seen != list(range(8))[::-1]


def test_sample_order_is_one(dls):
    with pytest.raises(ValueError, match='Backwards and Backwards each need an order of the samples of their own'):
        sparse_learner(dls, 'segformer_mit_b0', [Backwards(), Backwards()], decoder_dim=16)
    learn = sparse_learner(dls, 'segformer_mit_b0', decoder_dim=16)
    with pytest.raises(RuntimeError, match='give it to `sparse_learner`, not to `fit`'), learn.no_bar():
        learn.fit(1, cbs=Backwards())
    learn = sparse_learner(dls, 'segformer_mit_b0', Backwards(), decoder_dim=16)
    dls.train.order = mine = lambda dataset: range(8)
    try:
        with pytest.raises(ValueError, match='has an order of its own'), learn.no_bar(): learn.fit(1)
        assert dls.train.order is mine
    finally: dls.train.order = None


def test_values(dls):
    for kwargs in (dict(weight=-.1), dict(weight=float('nan')), dict(start=-.1), dict(start=1.5),
                   dict(warmup=2), dict(warmup=float('nan'))):
        (name, value), = kwargs.items()
        with pytest.raises(ValueError, match=f'{name}={value}: expected'): LossTerm(**kwargs)
    with pytest.raises(NotImplementedError, match='Forgot has no `terms`'):
        fit(make(dls, type('Forgot', (LossTerm,), {})()))


def test_needs_are_checked_before_any_work(dls):
    ran = []
    class Needs(Confidence):
        def check(self, learn): raise ValueError(f"needs what {type(learn.model).__name__} lacks")
        def terms(self): ran.append(1); return super().terms()
    with pytest.raises(ValueError, match='needs what Segmenter lacks'): make(dls, Needs())
    with pytest.raises(ValueError, match='needs what Segmenter lacks'):
        sparse_learner(dls, 'segformer_mit_b0', Needs(), decoder_dim=16)
    learn = make(dls)
    with pytest.raises(ValueError, match='needs what Segmenter lacks'), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Needs())
    assert not ran


@pytest.mark.parametrize('method,message', [
    (lambda: SASFormerLoss(), "model='segformer_resnet18': Segmenter: queries and keys cannot be read"),
    (lambda: SASFormerLoss(form=Form(blocks=(1, 5))),
     r"blocks=\(1, 5\): segformer_mit_b0 has blocks 1 to 4, not \[5\]")])
def test_attention_is_checked(dls, method, message):
    with pytest.raises(ValueError, match=message):
        make(dls, method(), name='segformer_resnet18' if 'resnet' in message else 'segformer_mit_b0')


def test_mask_transformer_is_one_more_block(dls):
    kwargs = dict(name='segmenter_vit_tiny_patch16_224', decoder_dim=64)
    make(dls, SASFormerLoss(form=Form(blocks=(5,))), **kwargs)
    with pytest.raises(ValueError, match=r'has blocks 1 to 5, not \[6\]'):
        make(dls, SASFormerLoss(form=Form(blocks=(6,))), **kwargs)


@pytest.mark.parametrize('method', [lambda: SASFormerLoss(), lambda: TreeEnergyLoss(channels=8)],
                         ids=['sasformer', 'tel'])
@pytest.mark.parametrize('error', [CancelFitException, CancelTrainException, KeyboardInterrupt])
def test_nothing_stays_on_the_model(dls, method, error):
    class Stop(Callback):
        order, run_valid = 50, False
        def after_loss(self): raise error
    learn = sparse_learner(dls, 'segformer_mit_b0', method(), decoder_dim=16)
    hooks = []
    class Validate(Callback):
        def before_validate(self): hooks.append(count())
    def count(): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in learn.model.modules())
    before = count()
    learn.add_cbs([Stop(), Validate()])
    with learn.no_bar(), learn.no_logging():
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt): learn.fit(1)
        else: learn.fit(1)
    assert count() == before and all(h == before for h in hooks)


def test_layers_of_its_own_get_a_gradient_before_start(dls):
    "`DistributedDataParallel` waits for one of every parameter"
    grads = []
    class Look(Callback):
        run_valid = False
        def before_step(self):
            of = self.model.auxiliary['tree'].parameters()
            grads.append([p.grad if p.grad is None else p.grad.abs().max().item() for p in of])
    learn = make(dls, TreeEnergyLoss(channels=8, start=.5), Look())
    fit(learn, 2)
    n = len(grads)//2
    assert all(g == 0 for o in grads[:n] for g in o) and any(g > 0 for o in grads[n:] for g in o)
    assert learn.tree_energy_loss.epochs[0] == {} and learn.tree_energy_loss.epochs[1]['tree'] > 0


def test_curves(dls):
    "Each term under its own name, from the epoch on in which it came in"
    from matplotlib import pyplot as plt
    from sasformer.train import plot_curves
    learn = fit(make(dls, Confidence(), Other(start=1), SASFormerLoss(form=Form(blocks=(1, 3)), start=.5)), 2)
    added = [{**a, **b} for a, b in zip(learn.confidence.epochs, learn.sasformer_loss.epochs)]
    rows = [dict(epoch=i+1, train_loss=1., miou=.5, lr=.1, **added[i]) for i in range(2)]
    fig = plot_curves(rows)
    lines = {l.get_label(): list(l.get_xdata()) for ax in fig.axes for l in ax.lines}
    plt.close(fig)
    assert lines == dict(train_loss=[1, 2], miou=[1, 2], square=[1, 2], top=[1, 2], aff1=[2], aff3=[2])


def two_terms():
    class Rank(LossTerm):
        def terms(self): return dict(rank=self.logits.mean()*0+dist.get_rank()+1.)
    dls = sparse_dataloaders(scenes(n_train=8, n_val=4, size=32), 'scribble', size=32, bs=4, device='cpu')
    learn = sparse_learner(dls, 'segformer_mit_b0', [TreeEnergyLoss(channels=8, start=.5), Rank()], decoder_dim=16)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=2)
    assert [e['rank'] for e in learn.rank.epochs] == [1.5, 1.5], learn.rank.epochs
    tree = torch.tensor([learn.tree_energy_loss.epochs[1]['tree']])
    both = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(both, tree)
    assert learn.tree_energy_loss.epochs[0] == {} and torch.equal(*both) and tree > 0


def test_two_processes():
    "Epochs hold the mean over the processes, and layers that wait for `start` do not stop the training"
    for p in fork_two(connected, two_terms): p.finish()
