"Sizes, backbones, batch sizes, numbers and starting points: what is not possible is said in a line, before any work"
import inspect, math
from dataclasses import replace

import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from conftest import write_folder
from sasformer import train
from sasformer.data import sparse_dataloaders
from sasformer.datasets import folder, scenes
from sasformer.inference import evaluate, predict_image
from sasformer.learner import labelled_loss, partial_cross_entropy, save_segmenter, sparse_learner, start_from
from sasformer.recipes import Recipe
from sasformer.sasformer import Form, SASFormerLoss, affinity_loss
from sasformer.segmenters import _one_size, create_segmenter
from sasformer.tel import TreeEnergyLoss
from test_cli import fails

ARGS = ('--data scenes:n_train=4,n_val=1,size=32 --method baseline --epochs 1 --size 32 --bs 4 --decoder_dim 16 '
        '--device cpu --precision fp32').split()


@pytest.fixture(scope='module')
def src(): return scenes(n_train=4, n_val=2, size=32)


def learner(src, method='sasformer', model='segformer_mit_b0', size=32, bs=4, **kw):
    dls = sparse_dataloaders(src, 'scribble', size=size, bs=bs, device='cpu')
    return sparse_learner(dls, model, method, precision='fp32', **{'decoder_dim': 16, **kw})


def quietly(learn, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=1, **kw)
    return learn


# Sizes

@pytest.mark.parametrize('method', ['sasformer', 'tel'])
@pytest.mark.parametrize('model, size', [('segformer_mit_b0', 20), ('segmenter_vit_tiny_patch16_224', 40)])
def test_crops_of_any_size(src, method, model, size):
    "What is added to a crop is padding for every loss: the same as a crop that was padded by hand"
    learn = learner(src, f'{method}', model, size, **(dict(depth=4, decoder_dim=64) if 'vit' in model else {}))
    seen = []
    term = learn.sasformer_loss if method == 'sasformer' else learn.tree_energy_loss
    whole = term.terms
    term.terms = lambda: seen.append((term.x.shape[-2:], term.label_map)) or whole()
    quietly(learn)
    shape, labels = seen[0]
    assert shape == labels.shape[-2:] == ((32, 32) if size == 20 else (48, 48))
    assert (labels[:, size:] == 254).all() and (labels[:, :, size:] == 254).all()
    assert all(np.isfinite(v) for v in term.epochs[0].values())

def test_images_of_any_size_in_validation_and_prediction(tmp_path):
    write_folder(scenes(n_train=2, n_val=2, size=96), tmp_path)
    for what in ('images', 'masks'):
        f = sorted((tmp_path/what/'val').iterdir())[0]
        Image.open(f).crop((0, 0, 90, 20)).save(f)
    own = folder(tmp_path)
    dls = sparse_dataloaders(own, 'dense', size=32, bs=2, device='cpu')
    model = create_segmenter('segformer_mit_b0', len(own.classes), decoder_dim=16)
    learn = sparse_learner(dls, model, precision='fp32')
    with learn.no_bar(): _, miou, accuracy, _ = learn.validate()
    found = evaluate(model, own, progress=False)
    assert math.isclose(miou, found.miou, rel_tol=1e-5) and math.isclose(accuracy, found.pixel_accuracy, rel_tol=1e-5)
    assert predict_image(model, np.zeros((20, 90, 3), np.uint8)).shape == (20, 90)
    x = torch.randn(1, 3, 20, 90)
    with torch.no_grad(): y = model.eval()(x)
    assert y.shape[-2:] == (20, 90)


# Backbones

SMALL_SWIN = dict(depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 1, 2, 2))

@pytest.mark.parametrize('name, kw', [
    ('swin_tiny_patch4_window7_224', SMALL_SWIN), ('swinv2_tiny_window8_256', SMALL_SWIN),
    ('swinv2_cr_tiny_ns_224', SMALL_SWIN), ('pvt_v2_b0', {}), ('edgenext_xx_small', {}), ('efficientvit_b0', {}),
    ('mobilevitv2_050', {}), ('csatv2', {}), ('lambda_resnet26t', {}), ('test_convnext', {}),
    ('test_efficientnet', {}), ('test_resnet', {}), ('test_vit', {}), ('hrnet_w18_small', {}), ('dla46_c', {}),
    ('tresnet_m', {}), ('samvit_base_patch16', dict(depth=2, global_attn_indexes=(1,), embed_dim=48, num_heads=2,
                                                    out_indices=(0, 1)))])
def test_backbones_of_any_size(name, kw):
    "Smaller and larger than they were trained with, odd, not square: gradients reach all"
    model = create_segmenter(f'segformer_{name}', 3, decoder_dim=8, **kw).eval()
    with torch.no_grad():
        for size in (65, 101), (32, 40), (20, 90):
            y = model(torch.randn(1, 3, *size))
            assert y.isfinite().all() and y.shape[2]*size[1] == pytest.approx(y.shape[3]*size[0], rel=.2)
    model.train()(torch.randn(2, 3, 64, 96)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None and 'head' not in n]

BOUND = '''beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_tiny convit_tiny efficientformer_l1
efficientformerv2_s0 gcvit_xxtiny hiera_tiny_224 levit_128s maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 mvitv2_tiny
nest_tiny pit_ti_224 volo_d1_224 gmlp_ti16_224 tnt_s_patch16_224 visformer_tiny
vit_relpos_small_patch16_224 vitamin_small_224'''.split()

@pytest.mark.parametrize('name', BOUND)
def test_backbones_of_one_size_are_refused(name):
    with pytest.raises(ValueError, match=f"segformer_{name}: timm's {name} works at one image size only"):
        create_segmenter(f'segformer_{name}', 3)

@pytest.mark.parametrize('name', ['inception_v3', 'inception_v4', 'inception_resnet_v2'])
def test_backbones_without_padding_are_refused(name):
    with pytest.raises(ValueError, match=f"segformer_{name}: {name} convolves without padding"):
        create_segmenter(f'segformer_{name}', 3)

def test_every_refused_family_is_tested():
    from timm.models import is_model_in_modules
    assert all(any(is_model_in_modules(n, (m,)) for n in BOUND) for m in _one_size)

def test_one_size_that_is_named():
    "Who names the size and keeps to it can have such a backbone"
    model = create_segmenter('segformer_levit_128s', 3, decoder_dim=8, img_size=64)
    assert model(torch.randn(2, 3, 64, 64)).shape[:2] == (2, 3)


# Batches and numbers

def test_batches_of_one_image(tmp_path, capsys):
    one = [*ARGS, '--bs', '1', '--out', tmp_path/'a']
    fails(train.main, [*one, '--model', 'deeplabv3plus_resnet18'], capsys, 'bs=1', 'at least 2', '--bs')
    # with 32 pixels a stride of 32 leaves one
    fails(train.main, [*one, '--model', 'segformer_test_resnet'], capsys, 'bs=1', 'crops of 32×32', '--size')

@pytest.mark.parametrize('model, size', [('segformer_mit_b0', 32), ('segformer_test_resnet', 64)])
def test_one_image_is_enough(src, model, size):
    quietly(learner(src, 'baseline', model, size, bs=1))

def of_recipe(**kw): return lambda: Recipe(epochs=1, **kw)

@pytest.mark.parametrize('make, message', [
    (lambda: SASFormerLoss(alpha=-1), 'alpha=-1: expected 0 or more'),
    (lambda: SASFormerLoss(alpha=math.inf), 'alpha=inf'), (lambda: TreeEnergyLoss(weight=math.nan), 'weight=nan'),
    (lambda: TreeEnergyLoss(sigma=math.nan), 'sigma=nan'), (lambda: Form(temperature=math.nan), 'temperature=nan'),
    (of_recipe(bs=2.5), 'bs=2.5: expected a whole number'), (of_recipe(bs=True), 'bs=True'),
    (of_recipe(lr='fast'), "lr='fast': expected a number"), (of_recipe(channels_last=1), 'expected True or False'),
    (of_recipe(loss='jaccard'), "'jaccard' is none of"), (of_recipe(loss='ce:gamma=1'), 'loss='),
    (of_recipe(class_weights='a,b'), 'class_weights='), (of_recipe(class_weights='1,-2'), 'class_weights='),
    (of_recipe(loss_at='pixels'), 'loss_at='), (of_recipe(init='a', weights='b'), 'give one of them')])
def test_constructors_judge_their_numbers(make, message):
    with pytest.raises(ValueError, match=message) as e: make()
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('kw', [dict(lr=math.nan), dict(head_lr=-1), dict(wd=math.inf), dict(validate_every=0),
                                dict(clip=0)])
def test_a_learner_judges_its_numbers(src, kw):
    with pytest.raises(ValueError, match=f'{next(iter(kw))}='): learner(src, None, **kw)

def test_foreign_ids_are_refused():
    logits, target = torch.randn(1, 3, 8, 8), torch.full((1, 8, 8), -100)
    target[0, 0] = 1
    for loss in (lambda: partial_cross_entropy(logits, target), lambda: affinity_loss({1: None}, logits, target),
                 lambda: labelled_loss('dice')(logits, target)):
        with pytest.raises(ValueError, match='a label map holds -100.*255 where nothing is labelled'): loss()


# Losses of the labelled pixels

def by_hand(spec, logits, target, w):
    "Pixel by pixel, class by class"
    full = F.interpolate(logits, target.shape[-2:], mode='bilinear')
    rows = [(full[b, :, i, j].softmax(0), int(target[b, i, j])) for b, i, j in (target < 254).nonzero()]
    if spec == 'dice':
        total = weight = 0.
        for c in range(logits.shape[1]):
            n = sum(y == c for _, y in rows)
            if not n: continue
            both, p = sum(p[c] for p, y in rows if y == c), sum(p[c] for p, _ in rows)
            total, weight = total+w[c]*(1-(2*both+1)/(p+n+1)), weight+w[c]
        return total/weight
    gamma = dict(ce=0, focal=2).get(spec, 3)
    return sum(-w[y]*(1-p[y])**gamma*p[y].log() for p, y in rows)/sum(w[y] for _, y in rows)

@pytest.mark.parametrize('weights', [None, (1., 3., .5, 0.)])
@pytest.mark.parametrize('spec', ['ce', 'focal', 'focal:gamma=3', 'dice'])
def test_losses_of_the_labelled_pixels(spec, weights):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 4, 5, requires_grad=True)
    target = torch.randint(0, 3, (2, 9, 11)).where(torch.rand(2, 9, 11) < .2, 255)   # class 3 is never labelled
    target[0, 0] = 254
    values = labelled_loss(spec, weights)(logits, target), by_hand(spec, logits, target, weights or [1.]*4)
    grads = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in values]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    nothing = labelled_loss(spec, weights)(logits, torch.full((2, 9, 11), 255))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().max() == 0

def test_the_default_is_partial_cross_entropy(): assert labelled_loss('ce') is partial_cross_entropy

def test_losses_are_options(src, tmp_path):
    r = Recipe(epochs=1, size=32, bs=4, method='baseline', loss='focal:gamma=1+dice', class_weights='balanced',
               loss_at='scores', decoder_dim=16, precision='fp32')
    learn = r.learner(src, device='cpu')
    n = sum(np.bincount(src.annotation(i, 'scribble').ravel(), minlength=256)[:6] for i in src.splits['train'])
    expected = [n.sum()/((n > 0).sum()*k) if k else 1. for k in n]
    assert r.weights_of_classes(src, 'scribble') == pytest.approx(expected)
    x, y = learn.dls.train.one_batch()[:2]
    logits = torch.randn(4, 6, 8, 8)
    small = F.interpolate(y[:, None].float(), (8, 8))[:, 0].long()   # nearest
    parts = [labelled_loss(s, expected)(logits, small) for s in ('focal:gamma=1', 'dice')]
    torch.testing.assert_close(learn.loss_func(logits, y), sum(parts))
    quietly(learn)
    assert r.settings()['loss'] == r.loss
    with pytest.raises(ValueError, match='2 numbers, expected one for each of the 6 classes'):
        Recipe(epochs=1, size=32, bs=4, class_weights='1,2').learner(src, device='cpu')


# Starting from a whole segmenter

def test_init_takes_classes_by_name(src, tmp_path, capsys):
    names = list(map(str, src.classes))
    old = create_segmenter('segformer_mit_b0', 5, decoder_dim=16)
    save_segmenter(old, tmp_path/'old', classes=[names[2], 'something else', names[0], *names[4:]])
    r = Recipe(epochs=1, size=32, bs=4, method='baseline', decoder_dim=16, init=str(tmp_path/'old'))
    new = r.learner(src, device='cpu').model
    said = capsys.readouterr().out
    assert f'begun anew: {names[1]}, {names[3]}\n' in said and f'classes by name: {names[0]}, {names[2]}' in said
    for k in ('weight', 'bias'):
        ours, theirs = getattr(new.decoder.classify, k), getattr(old.decoder.classify, k)
        assert torch.equal(ours[[0, 2, 4, 5]], theirs[[2, 0, 3, 4]]) and not torch.equal(ours[[1, 3]], theirs[[1, 3]])
    a, b = old.backbone.state_dict(), new.backbone.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and torch.equal(old.decoder.fuse.weight, new.decoder.fuse.weight)
    wider = replace(r, decoder_dim=32).learner(src, device='cpu')     # what does not fit is said
    assert 'not taken: decoder.project.0.weight' in capsys.readouterr().out and wider.recipe.settings()['init'] == 'old'
    fails(train.main, [*ARGS, '--init', tmp_path/'none', '--out', tmp_path/'x'], capsys, tmp_path/'none')
    other = [*ARGS, '--init', tmp_path/'old', '--model', 'segformer_test_resnet', '--out', tmp_path/'y']
    fails(train.main, other, capsys, 'nothing of segformer_mit_b0 fits the backbone of segformer_test_resnet')

@pytest.mark.parametrize('name, kw', [
    ('segmenter_test_vit', {}), ('maskformer_test_resnet', dict(n_queries=4, n_layers=1))])
def test_init_of_other_decoders(name, kw):
    "Class tokens, norms over the classes, MaskFormer's 'no object'"
    old, new = (create_segmenter(name, n, decoder_dim=64, **kw) for n in (3, 4))
    old.classes = list('abc')
    assert 'not taken' not in start_from(new, old, list('cxay'))
    if 'maskformer' in name:
        ours, theirs = (m.decoder.proposals.name.weight for m in (new, old))
        assert torch.equal(ours[[0, 2, 4]], theirs[[2, 0, 3]])
    else: assert torch.equal(new.decoder.tokens[:, [0, 2]], old.decoder.tokens[:, [2, 0]])


# Runs

def test_allow_changes_needs_a_run_that_goes_on(tmp_path, capsys):
    fails(train.main, [*ARGS, '--allow_changes', '--out', tmp_path/'a'], capsys, '--allow_changes is of --resume')

def test_self_training_passes_allow_changes_on(monkeypatch, tmp_path):
    seen = []
    passed = inspect.signature(train.train).bind
    monkeypatch.setattr(train, 'train', lambda *a, **k: seen.append(passed(*a, **k).arguments.get('allow_changes')))
    monkeypatch.setattr(train, 'finished', lambda *a: len(seen) > 0)
    monkeypatch.setattr(train, 'label_novel', lambda *a: {})
    r = Recipe(epochs=1, method='simformer', annotation='dense:novel=disc', model='maskformer_mit_b0', self_train=True)
    train.self_train(r, tmp_path, allow_changes=True)
    assert seen == [True, True]
