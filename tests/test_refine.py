"Refinement by colour against loops; the dense CRF against a literal mean field, in the programs, and as a loss"
import json
from types import SimpleNamespace
import numpy as np, pytest, torch, torch.nn.functional as F
from sasformer import evaluate, measure, predict
from sasformer.annotations import PADDING, UNLABELLED
from sasformer.bench import main as bench
from sasformer.crf import CRFLoss, dense_energy, energy_gate
from sasformer.data import normalise, sparse_dataloaders
from sasformer.datasets import scenes
from sasformer.inference import multi_scale_logits
from sasformer.learner import save_segmenter, sparse_learner
from sasformer.methods import parse_method
from sasformer.refine import (GaussianFilter, bilateral_features, dense_crf, pixel_adaptive_refinement,
                              unfolded_refinement)
from sasformer.segmenters import create_segmenter

BACKENDS = 'numba', 'torch'
BOXES = torch.tensor([[2, 0, 9, 14], [0, 0, 13, 17], [12, 3, 13, 4]])


def loops(image, scores, dilations, iterations, w1=.3, w2=.3, w3=.01):
    "One image, float64: eq. 11 and 12 of AFA, pixel by pixel"
    H, W = image.shape[1:]
    softmax = lambda v: np.exp(v-v.max())/np.exp(v-v.max()).sum()
    steps = [(i*d, j*d) for d in dilations for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    far = np.array([np.hypot(*s) for s in steps])
    for _ in range(iterations):
        new = np.empty_like(scores)
        for y, x in np.ndindex(H, W):
            at = [(min(max(y+i, 0), H-1), min(max(x+j, 0), W-1)) for i, j in steps]
            near = np.stack([image[:, r, c] for r, c in at])
            spread = near.std(0, ddof=1)+1e-8
            rgb = -(((near-image[:, y, x])/(w1*spread))**2).mean(1)
            w = softmax(rgb)+w3*softmax(-(far/(w2*(far.std(ddof=1)+1e-8)))**2)
            new[:, y, x] = sum(k*scores[:, r, c] for k, (r, c) in zip(w, at))
        scores = new
    return scores


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 13, 17), generator=g)/255
    image[0, :, :5] = .25   # a flat region: its neighbours have no spread
    return image, torch.rand(3, 4, 13, 17, generator=g)


@pytest.mark.parametrize('refine', [unfolded_refinement, *(
    lambda *a, b=b, **kw: pixel_adaptive_refinement(*a, backend=b, **kw) for b in BACKENDS)], ids=['plain', *BACKENDS])
@pytest.mark.parametrize('dilations', [(1, 2, 4, 8, 12, 24), (3,)])
def test_par_is_the_equation(batch, refine, dilations):
    image, scores = batch
    y = refine(image, scores, dilations=dilations, iterations=3)
    assert y.dtype == torch.float32
    for i in range(2):
        expected = loops(image[i].double().numpy(), scores[i].double().numpy(), dilations, 3)
        np.testing.assert_allclose(y[i].numpy(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('backend', BACKENDS)
def test_par_stays_in_its_boxes(batch, backend):
    image, scores = batch
    y, expected = pixel_adaptive_refinement(image, scores, boxes=BOXES, backend=backend), scores.clone()
    for i, (t, l, b, r) in enumerate(BOXES.tolist()):
        part = image[i:i+1, :, t:b, l:r], scores[i:i+1, :, t:b, l:r]
        expected[i, :, t:b, l:r] = unfolded_refinement(*part)[0]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    outside = torch.ones(13, 17, dtype=bool)
    outside[2:9, :14] = False
    assert torch.equal(y[0, :, outside], scores[0, :, outside])


@pytest.mark.parametrize('backend', BACKENDS)
def test_par_leaves_its_inputs_and_layouts_alone(batch, backend):
    image, scores = (t.double().to(memory_format=torch.channels_last).requires_grad_() for t in batch)
    y = pixel_adaptive_refinement(image, scores, backend=backend)
    assert y.dtype == torch.float32 and not y.requires_grad
    assert torch.equal(image.float(), batch[0]) and torch.equal(scores.float(), batch[1])
    torch.testing.assert_close(y, pixel_adaptive_refinement(*batch, backend=backend), atol=1e-5, rtol=0)
    twice = pixel_adaptive_refinement(*batch, iterations=5, backend=backend)
    twice = pixel_adaptive_refinement(batch[0], twice, iterations=5, backend=backend)
    torch.testing.assert_close(y, twice, atol=1e-5, rtol=0)


@pytest.mark.parametrize('change, text', [
    (dict(scores=torch.rand(3, 4, 13, 16)), 'of one size'), (dict(image=torch.rand(3, 1, 13, 17)), 'of one size'),
    (dict(image=torch.rand(2, 3, 13, 17)), 'of one size'), (dict(image=torch.ones(3, 3, 13, 17).byte()), 'of floats'),
    (dict(scores=torch.rand(4, 13, 17)), 'of floats'), (dict(scores=None), 'NoneType'),
    (dict(iterations=0), 'iterations=0: expected 1 or more'), (dict(colour_sigma=-.3), 'colour_sigma=-0.3: expected'),
    (dict(position_sigma=0.), 'position_sigma=0.0'), (dict(position_weight=-1), 'position_weight=-1'),
    (dict(dilations=(1, 0)), r'dilations=\(1, 0\)'), (dict(dilations=()), r'dilations=\(\)'),
    (dict(boxes=BOXES[:2]), r'expected whole numbers, \(3, 4\)'), (dict(boxes=BOXES+1), 'bottom <= 13'),
    (dict(boxes=BOXES*0), 'top < bottom'), (dict(backend='cuda'), "backend='cuda'")])
def test_par_refuses(batch, change, text):
    image, scores = batch
    with pytest.raises(ValueError, match=text) as e:
        pixel_adaptive_refinement(**dict(dict(image=image, scores=scores), **change))
    assert '\n' not in str(e.value)


def test_par_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, 'fresh_peak', lambda args: 10. if args[-1] == 'inputs' else 12.)
    threads = torch.get_num_threads()
    small = ['par', '--size', '16', '--batch', '1', '--classes', '2', '--steps', '2', '--iterations', '2',
             '--threads', str(threads)]
    bench([*small, '--out', str(tmp_path/'par.json')])
    rows = json.loads((tmp_path/'par.json').read_text())['rows']
    assert list(rows) == ['plain', 'views', 'compiled']
    assert all(r['speed'] > 0 and r['extra_mb'] == 2 for r in rows.values())
    capsys.readouterr()
    bench([*small, '--memory_of', 'compiled'])
    assert float(capsys.readouterr().out) > 100


def kernel(f):
    "Symmetrically normalised, all pairs by hand"
    k = np.exp(-.5*((f[:, None]-f[None])**2).sum(-1))
    return k/np.sqrt(np.outer(k.sum(1), k.sum(0)))


def mean_field(probs, kernels, iterations):
    "With the penalty of every other class, as the paper has it"
    Q = probs
    for _ in range(iterations):
        penalty = [sum(w*k @ Q[:, [o for o in range(Q.shape[1]) if o != l]].sum(1) for w, k in kernels)
                   for l in range(Q.shape[1])]
        Q = probs*np.exp(-np.stack(penalty, 1))
        Q /= Q.sum(1, keepdims=True)
    return Q


def features(image, xy, rgb):
    H, W = image.shape[1:]
    y, x = np.mgrid[:H, :W]
    return np.concatenate([np.stack([x, y], -1)/xy, 255*image.permute(1, 2, 0).numpy()/rgb], -1).reshape(H*W, 5)


def test_crf_is_mean_field():
    g = torch.Generator().manual_seed(0)
    image, probs = torch.rand(2, 3, 7, 9, generator=g), torch.rand(2, 3, 7, 9, generator=g).softmax(1)
    q = dense_crf(probs, image, 4, pos_sigma=1.5, pos_weight=2, bilateral_xy=5, bilateral_rgb=90, exact=True)
    for im, p, ours in zip(image, probs, q):
        np.testing.assert_allclose(bilateral_features(im, 5, 90).numpy(), features(im, 5, 90), atol=1e-6)
        kernels = [(2, kernel(features(im, 1.5, 1)[:, :2])), (4, kernel(features(im, 5, 90)))]
        expected = mean_field(p.flatten(1).T.double().numpy(), kernels, 4)
        np.testing.assert_allclose(ours.flatten(1).T.numpy(), expected, atol=1e-5)


def photograph(n):
    "A scene and what a network at 1/8 may say of it"
    src = scenes(n_train=1, n_val=1, size=96)
    i = src.splits['val'][0]
    mask = torch.tensor(np.array(src.mask(i))).long()
    image = torch.tensor(np.array(src.image(i))).permute(2, 0, 1)[None]/255
    onehot = F.one_hot(mask, len(src.classes)).movedim(-1, 0)[None].float()
    small = F.interpolate(image, (n, n), mode='area')
    return small, F.interpolate(F.avg_pool2d(onehot, 8), (n, n), mode='bilinear'), F.interpolate(onehot, (n, n))


def test_lattice_approximates():
    """A simplex holds a Gaussian only roughly, and blurs stop where no pixel is: errors of the mean and of the classes
    are asked for. A wrong corner, weight or neighbour changes both by an order of magnitude"""
    image, probs, truth = photograph(48)
    f = bilateral_features(image[0], 16, 20)
    x = truth[0].flatten(1).T.contiguous()
    filters = [GaussianFilter(f, exact) for exact in (False, True)]
    norms = [g(torch.ones(len(x), 1)).rsqrt() for g in filters]
    a, b = (n*g(n*x) for g, n in zip(filters, norms))
    assert (a-b).abs().mean() < .05*b.mean()*len(b[0])
    q, exact = (dense_crf(probs, image, bilateral_xy=16, bilateral_rgb=20, exact=e).argmax(1) for e in (False, True))
    moved = exact != probs.argmax(1)
    assert moved.sum() > 40 and (q != exact).sum() < .25*moved.sum()


@pytest.mark.parametrize('d', [1, 2])
def test_lattice_has_the_deviation_of_its_features(d):
    "Spreading, blur and gathering together, averaged over places inside a grid of points: variance 1 in each direction"
    x = np.linspace(-6, 6, 481 if d == 1 else 49)
    f = np.stack(np.meshgrid(*[x]*d), -1).reshape(-1, d)
    W = GaussianFilter(torch.tensor(f)).apply(torch.eye(len(f), dtype=torch.float64)).numpy()
    inside = np.abs(f).max(1) < 2
    for j in range(d):
        moved = W[inside]*(f[None, :, j]-f[inside][:, None, j])**2
        assert (moved.sum(1)/W[inside].sum(1)).mean() == pytest.approx(1, rel=.05)


def test_lattice_is_linear_and_its_gradient_the_transpose():
    f = bilateral_features(photograph(12)[0][0], 4, 20)
    g, n = GaussianFilter(f), 144
    matrix = g.apply(torch.eye(n, dtype=torch.float64))
    x = torch.rand(n, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(g(x), matrix @ x)
    assert torch.autograd.gradcheck(g, x)
    assert (matrix >= 0).all() and (matrix.diagonal() > .1).all() and (matrix.diagonal() <= 1).all()


def test_crf_is_the_released_one():
    dcrf = pytest.importorskip('pydensecrf.densecrf')
    image, probs, _ = photograph(96)
    image = (255*image).round()
    crf = dcrf.DenseCRF2D(96, 96, len(probs[0]))
    crf.setUnaryEnergy(np.ascontiguousarray(-probs[0].clamp_min(1e-20).log().flatten(1).numpy()))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=64, srgb=5, rgbim=np.ascontiguousarray(image[0].movedim(0, -1).byte()), compat=4)
    theirs = np.array(crf.inference(10)).reshape(probs[0].shape)
    np.testing.assert_allclose(dense_crf(probs, image/255)[0].numpy(), theirs, atol=1e-3)


def test_crf_mends_a_coarse_prediction():
    image, probs, truth = photograph(96)
    wrong = lambda p: (p.argmax(1) != truth.argmax(1)).sum()
    q = dense_crf(probs, image)
    assert wrong(q) < wrong(probs)
    torch.testing.assert_close(q.sum(1), torch.ones(1, 96, 96))
    one = dense_crf(probs, torch.zeros_like(image), pos_weight=0, bilateral_weight=0)   # no neighbours: what it was
    torch.testing.assert_close(one, probs, atol=1e-6, rtol=0)


@pytest.mark.parametrize('change, text', [
    (dict(image=torch.rand(1, 3, 5, 4)), 'of one size'), (dict(iterations=0), 'iterations=0'),
    (dict(pos_sigma=-1), 'pos_sigma=-1: expected more than 0'), (dict(bilateral_rgb=0), 'bilateral_rgb=0'),
    (dict(bilateral_weight=-4), 'bilateral_weight=-4: expected 0 or more'),
    (dict(probs=-torch.ones(1, 2, 5, 5)), 'probs: expected 0 or more, the least is -1')])
def test_crf_refuses(change, text):
    with pytest.raises(ValueError, match=text) as e:
        dense_crf(**dict(dict(probs=torch.rand(1, 2, 5, 5), image=torch.rand(1, 3, 5, 5)), **change))
    assert '\n' not in str(e.value)


def test_crf_in_the_programs(tmp_path, monkeypatch):
    "The option reaches the prediction, and the result file says so"
    src = scenes(n_train=1, n_val=1, size=64)
    torch.manual_seed(0)
    model = create_segmenter('segformer_mit_b0', len(src.classes), decoder_dim=16).eval()
    torch.nn.init.normal_(model.decoder.classify.weight, std=1.)
    save_segmenter(model, tmp_path, 'model', src.classes, src.palette)
    monkeypatch.setattr(evaluate, 'open_data', lambda *a: src)
    photo = src.image(src.splits['val'][0])
    photo.save(tmp_path/'photo.png')
    masks = {}
    for flags in ([], ['--crf']):
        out = tmp_path/f'masks{len(flags)}'
        predict.main([str(tmp_path/'model.safetensors'), str(tmp_path/'photo.png'), '--out', str(out), '--no-overlay',
                      '--device', 'cpu', '--precision', 'fp32', *flags])
        masks[len(flags)] = (out/'photo.png').read_bytes()
        evaluate.main([str(tmp_path/'model.safetensors'), '--data', 'scenes', '--device', 'cpu', '--precision', 'fp32',
                       '--out', str(tmp_path/f'{len(flags)}.json'), *flags])
    results = [json.loads((tmp_path/f'{n}.json').read_text()) for n in (0, 1)]
    assert [r['crf'] for r in results] == [False, True] and results[0]['miou'] != results[1]['miou']
    assert masks[0] != masks[1]
    x = torch.randn(1, 3, 64, 64)
    p = multi_scale_logits(model, x, [1.], False).exp()
    assert not torch.allclose(multi_scale_logits(model, x, [1.], False, crf=True).exp(), p, atol=.01)


def all_pairs(S, image, gate, xy, rgb):
    "The energy with every pair's weight in a matrix, float64"
    total = 0
    for s, im, g in zip(S, image, gate):
        f = torch.tensor(features(im.double(), xy, rgb))
        W = torch.exp(-.5*(f[:, None]-f[None]).square().sum(-1))
        s = s.flatten(1)
        total = total-(s*g.flatten()*(s @ W.T)).sum()
    return total/len(S)


@pytest.fixture
def energy_inputs():
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)
    S = rand(2, 3, 6, 7).softmax(1)
    S[1, :, 4:] = 0   # padding
    return S.requires_grad_(), rand(2, 3, 6, 7), energy_gate(S, rand(2, 6, 7) < .5)


def test_energy_and_its_gradient_are_those_of_all_pairs(energy_inputs):
    S, image, gate = energy_inputs
    values = [f(S, image, gate, 3., 80.) for f in (all_pairs, lambda *a: dense_energy(*a, exact=True))]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, S)[0] for v in values))
    assert torch.autograd.gradcheck(lambda S: dense_energy(S, image, gate, 3., 80.), S)   # through the lattice


def test_released_gradient(energy_inputs):
    "Theirs is ours where nothing is labelled, up to what the lattice lacks of symmetry, and another where something is"
    S, image, gate = energy_inputs
    grad = lambda G, **kw: torch.autograd.grad(dense_energy(S, image, G, 3., 80., exact=True, **kw), S)[0]
    torch.testing.assert_close(grad(None), grad(None, gradient='released'))
    assert (grad(gate)-grad(gate, gradient='released')).abs().max() > .01*grad(gate).abs().max()
    a, b = (dense_energy(S, image, gate, 3., 80., gradient=o) for o in ('exact', 'released'))
    assert a.item() == pytest.approx(b.item())


def test_gate():
    probs = torch.tensor([[.7, .3], [.5, .5]]).T.reshape(1, 2, 1, 2).requires_grad_()
    gate = energy_gate(probs, torch.tensor([[[True, False]]]))
    torch.testing.assert_close(gate, torch.tensor([[[.3, 1.]]]))
    assert not gate.requires_grad


def test_crf_loss_counts_no_padding():
    "Padding gets no gradient, and adds nothing"
    g = torch.Generator().manual_seed(0)
    image, labels = torch.rand(1, 3, 16, 16, generator=g), torch.full((1, 16, 16), UNLABELLED)
    labels[:, 2:4, :8], labels[:, :, 8:] = 1, PADDING
    def term(scores, image):
        loss = CRFLoss(xy=6., rgb=80.)
        loss.learn = SimpleNamespace(pred=scores, x=normalise(255*image), yb=(labels,), model=None, cbs=[])
        return loss.terms()['crf']
    scores = torch.randn(1, 3, 16, 16, generator=g).requires_grad_()
    value = term(scores, image)
    to_scores, = torch.autograd.grad(value, scores)
    assert value < 0 and (to_scores[..., 8:] == 0).all() and (to_scores[..., :8] != 0).any()
    alone = SimpleNamespace(pred=scores[..., :8], x=normalise(255*image[..., :8]), yb=(labels[..., :8],), model=None,
                            cbs=[])
    cut = CRFLoss(xy=6., rgb=80.)
    cut.learn = alone   # without the padding, whose pixels are points of the lattice too
    assert cut.terms()['crf'].item() == pytest.approx(value.item(), rel=.1)


def test_crf_beside_another_method():
    src = scenes(n_train=4, n_val=2, size=64)
    dls = sparse_dataloaders(src, 'scribble', size=64, bs=4, device='cpu')
    learn = sparse_learner(dls, 'segformer_mit_b0', method='sasformer+crf:start=0.5', decoder_dim=16,
                           validate_every=2)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=2)
    assert [list(e) for e in learn.crf_loss.epochs] == [[], ['crf']] and learn.crf_loss.epochs[1]['crf'] < 0
    assert all(learn.sasformer_loss.epochs)


@pytest.mark.parametrize('spec, text', [
    ('crf:xy=0', 'xy=0.0: expected more than 0'), ('crf:rgb=-15', 'rgb=-15.0: expected more than 0'),
    ('crf:weight=-1', 'weight=-1.0: expected 0 or more'), ('crf:gradient=half', 'expected one of exact, released'),
    ('crf:start=1', 'a fraction'), ('crf:sigma=1', "crf has no option 'sigma'")])
def test_crf_method_refuses(spec, text):
    with pytest.raises(ValueError, match=text): parse_method(spec)


def test_energy_refuses(energy_inputs):
    S, image, gate = energy_inputs
    with pytest.raises(ValueError, match='of one size'): dense_energy(S[..., 1:], image)
    with pytest.raises(ValueError, match='xy=-1'): dense_energy(S, image, xy=-1)
    with pytest.raises(ValueError, match="gradient='half'"): dense_energy(S, image, gradient='half')
