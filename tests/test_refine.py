"Refinement by colour against loops over pixels"
import numpy as np, pytest, torch
from sasformer.refine import pixel_adaptive_refinement, unfolded_refinement

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
