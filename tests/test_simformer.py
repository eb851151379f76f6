"SimFormer: what must be right when a batch, a pair or an image is out of the ordinary, and what a run must keep"
import json

import numpy as np, pytest, torch
from conftest import connected, fork_two
from fastai.callback.core import Callback
from PIL import Image
from sasformer.annotations import AnnotationError, image_tags, read_label_map, write_label_map
from sasformer.data import sparse_dataloaders
from sasformer.datasets import Source, folder, scenes, weak_shot
from sasformer.learner import sparse_learner
from sasformer.recipes import Recipe
from sasformer.simformer import complementary_loss, draw_partners, pair_order
from sasformer.train import main, with_novel

TINY = dict(decoder_dim=64, n_queries=8, n_layers=1)
OPTIONS = 'width=8,inside=8,outside=4,novel_points=8,blocks=2'
NOVEL = 'plain ring', 'striped disc'


def data(masks, tags=None, val=2):
    "A data set in memory, 32×32, with these training masks"
    rng = np.random.default_rng(0)
    train = [f'train{i}' for i in range(len(masks))]
    all_masks = dict(zip(train, masks)) | {f'val{i}': masks[0] for i in range(val)}
    images = {i: rng.integers(0, 256, (32, 32, 3), np.uint8) for i in all_masks}
    return Source('tiny', None, list('abcd'), dict(train=train, val=list(all_masks)[len(masks):]), images, all_masks,
                  tag_table=dict(zip(train, tags)) if tags else None)


def halves(left, right):
    m = np.full((32, 32), left, np.uint8)
    m[:,16:] = right
    return m


def learner(src, bs=2, method=f'simformer:{OPTIONS}'):
    dls = sparse_dataloaders(src, 'dense', size=32, bs=bs, device='cpu', scales=(1., 1.), aspect=1.)
    return sparse_learner(dls, 'maskformer_mit_b0', method, precision='fp32', lr=1e-3, **TINY)


def fit(src, epochs=1, **kwargs):
    learn = learner(src, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=epochs)
    return learn.sim_former_loss.epochs, learn.model.state_dict()


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_hidden_masks_change_nothing():
    "Another novel class, or none, where the training masks hide one: with the same tags not a bit of the model changes"
    masks = [halves(0, 2), halves(1, 3), halves(0, 3), halves(1, 2)]
    tags = [image_tags(m) for m in masks]
    hidden = [np.where(m >= 2, np.random.default_rng(i).choice([2, 3, 255], m.shape).astype(np.uint8), m)
              for i, m in enumerate(masks)]
    def trained(masks): return fit(weak_shot(data(masks, tags), ['c', 'd']))[1]
    one = trained(masks)
    assert same(one, trained(hidden))
    assert not same(one, trained([halves(1, 2), *masks[1:]])), 'a base mask does'


@pytest.mark.parametrize('masks,novel', [
    ([halves(0, 1), halves(1, 0)], 'cd'),           # a batch without any novel class
    ([halves(0, 2), halves(1, 3)], 'cd'),           # a pair that shares no class
    ([halves(2, 2), halves(0, 2)], 'cd'),           # an image whose only class is novel
    ([halves(2, 2), halves(3, 3)], 'cd'),           # nothing but novel classes: no base pixel at all
    ([halves(0, 0), halves(0, 0)], 'bcd')])         # one base class everywhere
def test_unusual_batches(masks, novel):
    (epoch,), state = fit(weak_shot(data(masks), list(novel)))
    assert all(np.isfinite(v) for v in epoch.values())
    assert all(v.isfinite().all() for v in state.values())
    has = [set(image_tags(m)) & {'abcd'.index(c) for c in novel} for m in masks]
    assert (epoch['complementary'] > 0) == any(has)
    assert (epoch['distillation'] != 0) == bool(has[0] & has[1])
    base = [set(image_tags(m))-{'abcd'.index(c) for c in novel} for m in masks]
    assert (epoch['similarity'] > 0) == any(base)


def test_the_mean_is_over_images_with_a_novel_tag():
    "An image without a novel query has no part in the complementary loss"
    torch.manual_seed(0)
    masks, labels = torch.randn(1, 2, 3, 8, 8), torch.tensor([0, 255, 254])[torch.randint(0, 3, (2, 32, 32))]
    novel = torch.tensor([[[False, True, False]]*2])
    one = complementary_loss(masks, novel, labels)
    two = complementary_loss(masks.repeat(1, 2, 1, 1, 1), torch.cat([novel, novel & False], 1), labels.repeat(2, 1, 1))
    assert two.item() == pytest.approx(one.item(), rel=1e-6)


def test_base_only_is_blind_to_novel_tags():
    "transfer=false: the tags of novel classes may be anything"
    masks = [halves(0, 2), halves(1, 3)]
    def trained(tags): return fit(weak_shot(data(masks, tags), ['c', 'd']), method='simformer:transfer=false')[1]
    assert same(trained([[0, 2], [1, 3]]), trained([[0, 2, 3], [1, 3, 2]]))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Twelve scenes as a folder"
    path, src = tmp_path_factory.mktemp('photos'), scenes(n_train=12, n_val=4, size=48)
    for s, ids in src.splits.items():
        for d in ('images', 'masks'): (path/d/s).mkdir(parents=True)
        for i in ids:
            src.image(i).save(path/f'images/{s}/{i}.png')
            write_label_map(path/f'masks/{s}/{i}.png', src.mask(i))
    (path/'classes.txt').write_text('\n'.join(src.classes))
    return path


ARGV = ['--recipe', 'simformer_scenes', '--data', 'folder', '--size', 32, '--bs', 4, '--epochs', 1, '--n_layers', 1,
        '--validate_every', 1, '--method', f'simformer:{OPTIONS}', '--device', 'cpu']


@pytest.mark.parametrize('args,message', [
    ('--novel cow', "folder has no class 'cow', it has background, striped disc"),
    ('--novel 0,1,2,3,4,5', 'all 6 classes of folder are novel'),
    ('--novel split1', 'folder has no published splits'),
    ('--bs 3', 'an even number in each process, got 3 images in 1 process'),
    ('--annotation dense', "needs novel classes, and annotation 'dense' of folder has none"),
    ('--annotation scribble --novel 1', 'needs whole masks of the base classes'),
    ('--model segformer_mit_b0', 'n_queries=12: only maskformer_<timm model> has it')])
def test_what_cannot_be_done_is_said_in_one_line(args, message, photos, tmp_path, capsys):
    "Before any work"
    argv = [*ARGV, '--path', photos, '--out', tmp_path/'run', *args.split()]
    with pytest.raises(SystemExit): main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
    assert not (tmp_path/'run').exists()


def test_one_training_image():
    with pytest.raises(ValueError, match='fewer than one batch'): learner(weak_shot(data([halves(0, 2)]), ['c']))
    with pytest.raises(ValueError, match='at least two'): draw_partners(np.ones((1, 2)), [1], [0], None)


class Tagged(list):
    seed = epoch = 0
    def tags(self, i): return torch.tensor(self[i]).float()


@pytest.mark.parametrize('n,bs', [(16, 8), (15, 4), (9, 8)])
@pytest.mark.parametrize('world', [2, 4])
def test_pairs_of_several_processes_are_those_of_one(n, bs, world):
    "Step by step; no pair is torn apart"
    if bs//world%2: pytest.skip('an odd number in each process')
    ds = Tagged(np.random.default_rng(1).random((n, 5)) < .4)
    def steps(world):
        order = pair_order(ds, [3, 4], world)
        mine = [order[r::world][:n//bs*bs//world].reshape(-1, bs//world//2, 2) for r in range(world)]
        return [sorted(map(tuple, np.concatenate(s).tolist())) for s in zip(*mine)]
    assert steps(world) == steps(1)
    first = steps(1)
    ds.epoch = 2
    assert steps(1) != first, 'another epoch draws anew'


def recipe_of(photos, **changes):
    return Recipe(**{**dict(data='folder', path=str(photos), annotation=f"dense:novel={'+'.join(NOVEL)}", size=32, bs=4,
                            model='maskformer_mit_b0', method=f'simformer:{OPTIONS}', epochs=2, lr=1e-3, clip=.01,
                            last_stride=1, dropout=0., drop_path=0., **TINY), **changes})


def state_of(path): return torch.load(path/'state.pt', weights_only=True)


class InterruptAt(Callback):
    "Ctrl-C at the beginning of an epoch"
    def __init__(self, epoch): self.at = epoch
    def before_train(self):
        if self.epoch == self.at: raise KeyboardInterrupt


def test_resumed_run_is_the_same_to_the_bit(photos, tmp_path):
    "The counts of the similarity network among it"
    r = recipe_of(photos)
    def run(folder, stop=None, resume=False):
        learn = r.learner(folder=tmp_path/folder, resume=resume, device='cpu')
        if stop: learn.add_cb(InterruptAt(stop))
        with learn.no_bar(), learn.no_logging(): r.run(learn)
    run('whole')
    with pytest.raises(KeyboardInterrupt): run('cut', stop=1)
    run('cut', resume=True)
    a, b = state_of(tmp_path/'whole')['model'], state_of(tmp_path/'cut')['model']
    assert same(a, b)
    assert (a['auxiliary.similarity.counts'].sum(1) > 0).sum() == 1+2*3
    saved = json.loads((tmp_path/'whole/result.json').read_text())['settings']
    assert saved['tags_of'] == 'image', 'every result says whose tags they are'


def train_in_two(r, folder):
    r.run(r.learner(folder=folder, device='cpu'))


def test_two_processes_equal_one(photos, tmp_path):
    "No dropout, and SGD: Adam's first steps are signs of gradients, which blow rounding up"
    r = recipe_of(photos, epochs=1, opt='sgd', precision='fp32')
    learn = r.learner(folder=tmp_path/'one', device='cpu')
    with learn.no_bar(), learn.no_logging(): r.run(learn)
    for p in fork_two(connected, train_in_two, r, tmp_path/'two'): p.finish()
    one, two = (json.loads((tmp_path/n/'result.json').read_text()) for n in ('one', 'two'))
    assert (one['processes'], two['processes']) == (1, 2)
    for k in ('class', 'mask', 'dice', 'complementary', 'similarity', 'distillation'):
        # three steps, each a few thousand roundings of float32
        assert two['curve'][0][k] == pytest.approx(one['curve'][0][k], rel=1e-4, abs=1e-6), k
    a, b = state_of(tmp_path/'one')['model'], state_of(tmp_path/'two')['model']
    assert torch.equal(a['auxiliary.similarity.counts'], b['auxiliary.similarity.counts'])


def test_self_training_in_stages(photos, tmp_path, capsys):
    "Each stage apart, an interrupted one goes on, and the second training knows all classes"
    argv = [*ARGV, '--path', photos]
    out = tmp_path/'run'
    def run(*more): main([str(a) for a in (*argv, '--self_train', 'true', '--out', out, *more)])
    with pytest.raises(SystemExit): run('--stage', 'retrain')
    assert 'teacher holds no finished training to label with' in capsys.readouterr().err
    run('--stage', 'train')
    assert (out/'teacher/result.json').exists() and not (out/'pseudo').exists()
    run('--stage', 'pseudo')
    src = folder(photos)
    annotation = f"dense:novel={'+'.join(NOVEL)}"
    for i in src.splits['train']:
        base, got = src.annotation(i, annotation), read_label_map(out/f'pseudo/train/{i}.png')
        assert (got[base < 254] == base[base < 254]).all()
        assert set(np.unique(got[base >= 254])) <= (set(src.tags(i)) & {1, 5}) | {255}
    (out/'pseudo/train'/f"{src.splits['train'][3]}.png").rename(tmp_path/'away.png')
    run()                                     # what is there stays, the rest is done
    result = json.loads((out/'result.json').read_text())
    assert result['settings']['self_train'] and result['settings']['annotation'] == annotation
    assert {'miou_base', 'miou_novel', 'miou_harmonic'} <= result['curve'][0].keys()
    assert not {'complementary', 'similarity', 'distillation'} & result['curve'][0].keys()
    assert read_label_map(tmp_path/'away.png').shape == (48, 48)
    beside = tmp_path/'beside'                # as masks of a plain folder
    beside.mkdir()
    for name in ('images', 'classes.txt'): (beside/name).symlink_to(photos/name)
    (beside/'pseudo').mkdir()
    (beside/'pseudo/train').symlink_to(out/'pseudo/train')
    (beside/'pseudo/val').symlink_to(photos/'masks/val')
    read = folder(beside, masks='pseudo').check(read=True)
    i = src.splits['train'][0]
    assert (read.mask(i) == read_label_map(out/f'pseudo/train/{i}.png')).all()


def test_novel_classes_of_the_command_line():
    assert with_novel('dense:novel=a', 'b,c') == 'dense:novel=b+c'


def test_tags_of_the_crop(photos):
    "By name, and never more than the image's"
    src = folder(photos)
    dls = {o: sparse_dataloaders(src, f'dense:novel={NOVEL[0]}', size=24, bs=4, device='cpu', tags_of=o).train.dataset
           for o in ('image', 'crop')}
    n = {o: torch.stack([ds[i][2] for i in range(len(ds))]) for o, ds in dls.items()}
    assert (n['crop'] <= n['image']).all() and n['crop'].sum() < n['image'].sum()
    with pytest.raises(ValueError, match='expected one of image, crop'): recipe_of(photos, tags_of='mask')


def test_weak_shot_names(photos):
    src = folder(photos)
    for novel, message in ((['cow'], 'has no class'), (src.classes, 'all 6 classes'), ([], 'at least one class')):
        with pytest.raises(AnnotationError, match=message): weak_shot(src, novel)


@pytest.mark.parametrize('method, model, annotation', (
    ('maskformer', 'maskformer_resnet18', 'dense'), ('simformer', 'maskformer_resnet18', 'dense:novel=d')))
def test_norms_stay_as_pretrained(method, model, annotation):
    "Weights and statistics of the backbone's batch normalisation, where the option says so"
    src = data([halves(0, 1), halves(1, 2), halves(0, 2), halves(0, 1)], [[0, 1, 3], [1, 2, 3], [0, 2, 3], [0, 1, 3]])
    dls = sparse_dataloaders(src, annotation, size=32, bs=4, device='cpu')
    for frozen in (True, False):
        learn = sparse_learner(dls, model, f'{method}:freeze_norms={frozen}', lr=.1, precision='fp32', **TINY)
        before = {k: v.clone() for k, v in learn.model.backbone.state_dict().items() if 'bn' in k}
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        after = learn.model.backbone.state_dict()
        assert before and all(torch.equal(v, after[k]) for k, v in before.items()) == frozen
