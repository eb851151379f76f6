"Trees and filters against SciPy, brute force and numerical gradients; the tree energy loss in training"
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.vision.all import Callback, Learner, SGD
from scipy.sparse import csr_array
from scipy.sparse.csgraph import minimum_spanning_tree as scipy_tree
from torch import nn
import sasformer.treefilter as trees
from sasformer.annotations import PADDING, UNLABELLED
from sasformer.data import sparse_dataloaders
from sasformer.datasets import scenes
from sasformer.learner import PlainTensors, partial_cross_entropy, sparse_learner
from sasformer.segmenters import create_segmenter
from sasformer.ltf import LTFDecoder
from sasformer.tel import TreeEnergyLoss, _tree_input, soft_labels, tree_energy
from sasformer.treefilter import affinity_to_parent, edge_affinity, grid_distances, minimum_spanning_tree, tree_filter

BACKENDS = 'numba', 'torch'
layouts = pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['first', 'last'])


def edges(d):
    "Ends and weights of the grid's edges, from distances (2, H, W)"
    H, W = d.shape[1:]
    i = np.arange(H*W).reshape(H, W)
    return (np.concatenate([i[:, :-1].ravel(), i[:-1].ravel()]), np.concatenate([i[:, 1:].ravel(), i[1:].ravel()]),
            np.concatenate([d[0, :, :-1].ravel(), d[1, :-1].ravel()]))


def parents(t): return torch.empty_like(t.order).scatter_(1, t.order, t.order.gather(1, t.parent))


def test_distances():
    f = np.random.default_rng(0).standard_normal((2, 3, 5, 7))
    for b in BACKENDS:
        d = grid_distances(torch.tensor(f), b).numpy()
        for y in range(5):
            for x in range(7):
                if x < 6: assert np.allclose(d[:, 0, y, x], ((f[:, :, y, x] - f[:, :, y, x+1])**2).sum(1))
                if y < 4: assert np.allclose(d[:, 1, y, x], ((f[:, :, y, x] - f[:, :, y+1, x])**2).sum(1))


def test_trees():
    rng = np.random.default_rng(0)
    for k in range(200):
        C, H, W = rng.integers(1, (4, 13, 13))
        f = torch.tensor(rng.standard_normal((2, C, H, W)))
        f = f*0 if k % 4 == 0 else f.round() if k % 4 == 1 else f   # constant; ties
        N, d = H*W, grid_distances(f)
        a, b = (minimum_spanning_tree(f, b) for b in BACKENDS)
        assert torch.equal(parents(a), parents(b)) and a.rounds == b.rounds and a.size == (H, W)
        for t in (a, b):
            assert (t.order.sort(1)[0] == torch.arange(N)).all() and (t.order[:, 0] == 0).all()
            assert (t.parent[:, 1:] < torch.arange(1, N)).all()   # so every pixel leads to the root
            p, q = t.order[:, 1:], parents(t).gather(1, t.order[:, 1:])
            low, high, e = torch.minimum(p, q), torch.maximum(p, q), t.edge[:, 1:]
            assert (e % N == low).all()
            assert (high-low == torch.where(e < N, 1, W)).all()
            assert ((e >= N) | (low % W < W-1)).all()
        if N == 1: continue
        for i in range(2):
            u, v, w = edges(d[i].numpy())
            expected = scipy_tree(csr_array((w+1, (u, v)), shape=(N, N))).sum() - (N-1)
            assert abs(d[i].flatten()[a.edge[i, 1:]].sum().item() - expected) < 1e-9*N


def path_products(tree, w):
    "S of the first image, by walking up from both ends to where the paths meet"
    up, N = parents(tree)[0].tolist(), len(tree.order[0])
    to_parent = torch.empty_like(w).scatter_(1, tree.order, w)[0].tolist()
    def above(i):
        path = {i: 1.}
        while i: path[up[i]] = path[i]*to_parent[i]; i = up[i]
        return path
    paths = [above(i) for i in range(N)]
    return torch.tensor([[next(a*p[k] for k, a in q.items() if k in p) for q in paths] for p in paths], dtype=w.dtype)


@pytest.mark.parametrize('backend', BACKENDS)
def test_filter_equals_path_products(backend):
    rng = np.random.default_rng(1)
    for k in range(25):
        C, K, H, W = rng.integers(1, (5, 6, 13, 13))
        f, x = torch.tensor(rng.random((1, C, H, W)))*(k % 5 > 0), torch.tensor(rng.random((1, K, H, W)))
        t = minimum_spanning_tree(f, backend)
        w = edge_affinity(f, t, .3, backend)
        S = path_products(t, w)
        expected = (x.flatten(2) @ S.T / S.sum(1)).view_as(x)
        torch.testing.assert_close(tree_filter(x, t, w, backend), expected, atol=1e-8, rtol=0)


@layouts
@pytest.mark.parametrize('size', [(4, 5), (1, 6), (6, 1), (1, 1)], ids=str)
def test_gradients(size, layout):
    torch.manual_seed(0)
    draw = lambda: torch.randn(2, 3, *size, dtype=torch.float64)
    f, x = (draw().contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    t = minimum_spanning_tree(f)
    for b in BACKENDS:
        w = edge_affinity(f, t, 1., b).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w: tree_filter(x, t, F.pad(w[:, 1:], (1, 0)), b), (x, w))
        assert torch.autograd.gradcheck(lambda x, f: tree_filter(x, t, edge_affinity(f, t, 2., b), b), (x, f))


@layouts
def test_backends_agree(layout):
    torch.manual_seed(0)
    P, low = torch.randn(3, 5, 20, 33).softmax(1).requires_grad_(), torch.rand(3, 3, 20, 33)
    high = torch.randn(3, 8, 20, 33).contiguous(memory_format=layout).requires_grad_()
    counted = torch.rand(3, 20, 33) > .3
    losses = [tree_energy(P, low, high, counted, .3, b) for b in BACKENDS]
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(l, (P, high)) for l in losses)):
        assert a.abs().max() > 0
        torch.testing.assert_close(a/b.abs().max(), b/b.abs().max(), atol=1e-5, rtol=0)


def test_threads():
    torch.manual_seed(0)
    x, f, n = torch.rand(5, 4, 9, 8), torch.rand(5, 3, 9, 8), torch.get_num_threads()
    def run():
        t = minimum_spanning_tree(f)
        return tree_filter(x, t, edge_affinity(f, t))
    results = []
    try:
        for k in (1, 3):
            torch.set_num_threads(k)
            results.append(run())
    finally: torch.set_num_threads(n)
    assert torch.equal(*results)


def test_low_precision_and_no_gradient_to_low():
    P = torch.rand(1, 3, 6, 6)
    low, high = torch.rand(1, 3, 6, 6, requires_grad=True), torch.rand(1, 4, 6, 6, requires_grad=True)
    y = soft_labels(P.bfloat16(), low, high.bfloat16())
    assert y.dtype == torch.float32
    g = torch.autograd.grad(y.square().sum(), (low, high), allow_unused=True)
    assert g[0] is None and g[1].abs().max() > 0


@pytest.mark.parametrize('backend', BACKENDS)
def test_bad_input(backend):
    f = torch.rand(3, 2, 4, 5)
    for value in (np.nan, np.inf):
        f[1, 0, 2, 2] = value
        with pytest.raises(ValueError, match='features of image 1 of the batch hold NaN'):
            minimum_spanning_tree(f, backend)
        with pytest.raises(ValueError, match='no tree can be built'):
            tree_energy(torch.rand(3, 2, 4, 5), torch.rand(3, 3, 4, 5), f, backend=backend)
    with pytest.raises(ValueError, match='images of equal size, .* got list'):
        minimum_spanning_tree([torch.rand(3, 4, 4), torch.rand(3, 5, 4)], backend)
    with pytest.raises(ValueError, match='got \\(3, 4, 4\\)'): minimum_spanning_tree(torch.rand(3, 4, 4), backend)
    t = minimum_spanning_tree(torch.rand(1, 3, 4, 4), backend)
    with pytest.raises(ValueError, match='2 maps of \\(4, 4\\)'):
        tree_filter(torch.rand(2, 1, 4, 4), t, torch.rand(2, 16), backend)
    with pytest.raises(ValueError, match='1 maps of \\(4, 5\\)'):
        edge_affinity(torch.rand(1, 3, 4, 5), t, backend=backend)
    with pytest.raises(ValueError, match='1 maps of \\(4, 5\\)'): affinity_to_parent(torch.rand(1, 2, 4, 5), t)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shape', [(1, 15), (1, 17), (16,), (2, 16), (1, 1), (1, 1, 16)], ids=str)
def test_weights_of_another_size(backend, shape):
    "The compiled loops would read beyond the end of the weights, and torch would repeat them"
    t = minimum_spanning_tree(torch.rand(1, 3, 4, 4), backend)
    with pytest.raises(ValueError, match='expected \\(1, 16\\), one for each pixel of each tree'):
        tree_filter(torch.rand(1, 2, 4, 4), t, torch.ones(shape), backend)


def test_cache_needs_no_folder(monkeypatch):
    "In a read-only installation functions are compiled all the same"
    from numba import njit
    from numba.core import caching
    def refuse(self): raise OSError('read-only')
    for c in vars(caching).values():
        if isinstance(c, type) and hasattr(c, 'ensure_cache_path'): monkeypatch.setattr(c, 'ensure_cache_path', refuse)
    with pytest.raises(RuntimeError): njit(cache=True)(lambda x: x)
    assert trees.compiled(lambda x: x+1)(1) == 2


# --- the callback

@pytest.fixture(scope='module')
def source(): return scenes(n_train=8, n_val=4, size=64)


class Edit(Callback):
    "Changes label maps, and keeps losses and gradients"
    order = 20
    def __init__(self, edit=None): self.edit = edit
    def before_fit(self): self.total, self.entropy, self.grads, self.terms = [], [], [], []
    def before_batch(self):
        if self.edit is not None: self.learn.yb = (self.edit(self.yb[0].clone()), *self.yb[1:])
    def after_loss(self):
        if not self.training: return
        self.total.append(self.loss.item())
        self.entropy.append(partial_cross_entropy(self.pred, self.yb[0]).item())
    def before_step(self):
        parameters = self.model.auxiliary.parameters() if hasattr(self.model, 'auxiliary') else []
        self.grads.append([None if p.grad is None else p.grad.clone() for p in parameters])


def make(source, *cbs, name='segformer_mit_b0', **kwargs):
    torch.manual_seed(0)
    dls = sparse_dataloaders(source, 'scribble', size=64, bs=4, device='cpu')
    model = create_segmenter(name, len(source.classes), **dict(dict(decoder_dim=32, dropout=0.), **kwargs))
    return Learner(dls, model, partial_cross_entropy, opt_func=SGD, lr=1e-2, cbs=[PlainTensors(), *cbs])


def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)
    return learn


@pytest.mark.parametrize('chosen', [('low', 'high'), ('low',), ('high',)], ids='+'.join)
def test_training(source, chosen):
    learn = make(source, TreeEnergyLoss(.4, trees=chosen, channels=8), watch := Edit())
    auxiliary = learn.model.auxiliary
    assert ('tree' in auxiliary) == ('high' in chosen)
    before = [p.detach().clone() for p in auxiliary.parameters()]
    fit(learn, 2)
    assert all(a > b for a, b in zip(watch.total, watch.entropy))
    mean = np.mean(np.array(watch.total) - watch.entropy)
    assert abs(.4*np.mean([e['tree'] for e in learn.tree_energy_loss.epochs]) - mean) < 1e-5
    assert learn.tree_energy_loss.epoch_values == learn.tree_energy_loss.epochs[-1]
    if 'high' in chosen:
        assert before[0].shape == (8, 32, 1, 1) and not torch.equal(before[0], next(auxiliary.parameters()))
    assert sum(len(m._forward_pre_hooks) for m in learn.model.modules()) == 0


@pytest.mark.parametrize('name, layer', [('segformer_mit_b0', 'dropout'), ('deeplabv3plus_resnet18', 'refine.1'),
                                         ('hrnet_hrnet_w18_small', 'fuse'), ('ltf_resnet18', 'head')])
def test_the_tree_is_of_the_released_features(name, layer):
    "Where the released code takes them, and the same whatever dropout leaves"
    model = create_segmenter(name, 3, **({} if name.startswith('hrnet') else dict(decoder_dim=32)), dropout=.5)
    found, channels = _tree_input(model)
    assert found is model.decoder.get_submodule(layer)
    seen = []
    found.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    x = torch.randn(2, 3, 64, 64)
    a, b = model(x), model(x)
    assert torch.equal(*seen) and seen[0].shape[1] == channels and not torch.equal(a, b)


def test_what_counts(source):
    "Nothing unlabelled: no term and zero gradients; the term looks at unlabelled pixels only"
    none = fit(make(source, TreeEnergyLoss(channels=8), watch := Edit(lambda y: y.where(y != UNLABELLED, PADDING))))
    assert watch.total == watch.entropy and none.tree_energy_loss.epochs == [{'tree': 0.}]
    assert all(g is not None and g.abs().max() == 0 for gs in watch.grads for g in gs)

    class Term(Callback):
        order = 4
        def after_loss(self):
            if not self.training: return
            P = self.pred.softmax(1)
            mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
            image = self.x*deviation + mean
            Y = soft_labels(P, F.interpolate(image, P.shape[2:], mode='bilinear'))
            on = F.interpolate(self.yb[0][:, None].float(), P.shape[2:])[:, 0] == UNLABELLED
            self.learn.expected = ((P-Y).abs().sum(1)*on).sum().item()/on.sum().item()
    def some(y):
        y[:, :, :32] = PADDING
        y[:, 40:] = 1
        return y
    learn = make(source, TreeEnergyLoss(1., trees='low'), watch := Edit(some), Term())
    fit(learn)
    assert abs(watch.total[-1] - watch.entropy[-1] - learn.expected) < 1e-5


def test_sparse_learner(source, tmp_path):
    "In the optimiser and in the state of a run, not in the saved segmenter; under bfloat16; a run goes on"
    from sasformer.learner import RunFolder, load_segmenter
    dls = sparse_dataloaders(source, 'scribble', size=64, bs=4, device='cpu')
    def learner():
        return sparse_learner(dls, 'segformer_mit_b0', TreeEnergyLoss(channels=8), decoder_dim=32, precision='bf16',
                              cbs=RunFolder(tmp_path, resume=True), lr=1e-2)
    learn = learner()
    before = learn.model.auxiliary['tree'].conv.weight.detach().clone()
    learn.fit_poly(epochs=1)
    assert not torch.equal(before, learn.model.auxiliary['tree'].conv.weight)
    assert 'auxiliary.tree.conv.weight' in torch.load(tmp_path/'state.pt', weights_only=True)['model']
    assert load_segmenter(tmp_path/'last.safetensors') is not None
    assert 'tree' in (tmp_path/'log.csv').read_text()


def test_any_segmenter(source):
    "Scores at other strides, other classifiers, input that is padded to whole patches"
    for name, kwargs in (('setr_vit_tiny_patch16_224', {}), ('segmenter_vit_tiny_patch16_224', dict(decoder_dim=64)),
                         ('linear_vit_tiny_patch16_224', dict(decoder_dim=None, dropout=None))):
        dls = sparse_dataloaders(source, 'scribble', size=(56, 64), bs=4, device='cpu')
        learn = make(source, TreeEnergyLoss(channels=8), watch := Edit(), name=name, **kwargs)
        learn.dls = dls
        fit(learn)
        assert watch.total[0] > watch.entropy[0] and all(g is not None for g in watch.grads[0])


def test_needs(source):
    with pytest.raises(ValueError, match="expected 'low', 'high' or both"): TreeEnergyLoss(trees=('low', 'middle'))
    with pytest.raises(ValueError, match='sigma=0'): TreeEnergyLoss(sigma=0)
    learn = make(source)
    with pytest.raises(RuntimeError, match='when the learner is made'), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=TreeEnergyLoss())
    with pytest.raises(ValueError, match='no decoder.classify'):
        Learner(learn.dls, nn.Conv2d(3, 5, 1), partial_cross_entropy, cbs=TreeEnergyLoss())
    class Mixed(Callback):
        order = 4
        def before_batch(self): self.learn.xb = ([x for x in self.x],)
    with pytest.raises(ValueError, match='a batch of images of one size'):
        fit(make(source, TreeEnergyLoss(channels=8), Mixed()))


def test_interrupted(source):
    class Stop(Callback):
        order = 30
        def after_loss(self): raise KeyboardInterrupt
    dls = sparse_dataloaders(source, 'scribble', size=64, bs=4, device='cpu')
    learn = sparse_learner(dls, 'segformer_mit_b0', TreeEnergyLoss(channels=8), decoder_dim=32, cbs=Stop())
    with pytest.raises(KeyboardInterrupt): learn.fit_poly(epochs=1)
    assert sum(len(m._forward_pre_hooks) for m in learn.model.modules()) == 0
    assert learn.tree_energy_loss._features is None


def test_ltf_opens_in_a_fresh_process(tmp_path):
    "One registry names every decoder: whoever opens a model need not have imported what it is made of"
    import subprocess, sys
    from sasformer.learner import save_segmenter
    torch.manual_seed(0)
    model = create_segmenter('ltf_resnet18', 5, decoder_dim=16).eval()
    save_segmenter(model, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    torch.save((x, model(x).detach()), tmp_path/'case.pt')
    code = ('import sys, torch; from sasformer.learner import load_segmenter\n'
            'model = load_segmenter(sys.argv[1]+"/last.safetensors"); x, y = torch.load(sys.argv[1]+"/case.pt")\n'
            'with torch.no_grad(): torch.testing.assert_close(model(x), y)')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ltf():
    model = create_segmenter('ltf_resnet18', 5, decoder_dim=16)
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 5, 16, 24) and out.requires_grad
    out.square().mean().backward()
    for n, p in model.decoder.named_parameters(): assert p.grad is not None and p.grad.abs().max() > 0, n
    with pytest.raises(ValueError, match='multiples of the 16 groups'): LTFDecoder([8, 8], 5, dim=20)
