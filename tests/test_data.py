"Samples of three parts, their order, and trainings that must not see what is hidden"
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from sasformer.annotations import AnnotationError
from sasformer.sasformer import SASFormerLoss
from sasformer.data import ImageTags, SparseDataset, SparseDL, shuffled, sparse_dataloaders
from sasformer.datasets import Source, scenes
from sasformer.learner import partial_cross_entropy, sparse_learner
from sasformer.tel import TreeEnergyLoss


@pytest.fixture(scope='module')
def src(): return scenes(n_train=12, n_val=4, size=64)


def hot(src, id): return [float(c in src.tags(id)) for c in range(len(src.classes))]


@pytest.mark.parametrize('annotation', ['dense', 'scribble', 'tag', 'point:novel=plain ring', 'sim_block20'])
@pytest.mark.parametrize('augment', [dict(size=(32, 32), augment=True), dict(size=(48, 40)), {}])
def test_every_sample_has_three_parts(src, annotation, augment):
    ds = SparseDataset(src, src.splits['train'], annotation, **augment)
    for epoch in range(2):
        ds.epoch = epoch
        image, labels, tags = ds[5]
        assert image.shape[1:] == labels.shape and (tags.dtype, type(tags)) == (torch.float32, ImageTags)
        assert tags.tolist() == hot(src, ds.ids[5])             # of the image, whatever a crop shows
        if annotation == 'tag': assert (labels >= 254).all()


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_and_inputs(src, workers):
    dls = sparse_dataloaders(src, 'scribble', size=32, bs=4, device='cpu', num_workers=workers)
    order = shuffled(dls.train.dataset)
    for k, (x, y, tags) in enumerate(dls.train):
        assert (x.shape, y.shape, tags.shape) == ((4, 3, 32, 32), (4, 32, 32), (4, 6))
        assert tags.tolist() == [hot(src, src.splits['train'][i]) for i in order[4*k:4*k+4]]
    assert dls.n_inp == dls.train.n_inp == dls.valid.n_inp == dls.train.new(bs=2).n_inp == 1
    assert len(dls.train.decode(dls.one_batch())) == 3


def test_augmentation_is_what_it_was(src):
    "The draws of the augmentation and of the order, as they were before samples had tags"
    ds = SparseDataset(src, src.splits['train'], 'scribble', size=(32, 32), augment=True, seed=3)
    ds.epoch = 2
    image, labels = ds.load(4)
    from sasformer.data import Geometry, warp_image, warp_labels
    rng = np.random.default_rng((3, 2, 4))
    g = Geometry.random(labels.shape, (32, 32), rng)
    assert (ds[4][0].permute(1, 2, 0).numpy() == warp_image(image, g, rng.uniform(-10, 10))).all()
    assert (ds[4][1].numpy() == warp_labels(labels, g)).all()
    order = np.arange(12)
    np.random.default_rng((3, 2)).shuffle(order)
    assert (shuffled(ds) == order).all()


def test_thin_labels_are_kept_but_not_those_of_masks(src):
    thin = {a: SparseDataset(src, [], a).thin
            for a in ('dense', 'dense:novel=plain ring', 'scribble', 'sim_scribble', 'scribble:novel=plain ring')}
    assert list(thin.values()) == [False, False, True, True, True]


# --- order

class Numbers(list): seed, epoch = 0, 0


def test_order_of_the_loader():
    asked = []
    def pairs(dataset):
        asked.append(dataset.epoch)
        return np.repeat(shuffled(dataset), 2)
    data = Numbers(range(10))
    dl = SparseDL(data, bs=2, shuffle=True, drop_last=True, order=pairs)
    for data.epoch in range(2):
        got = np.array(dl.get_idxs()).reshape(-1, 2)
        assert (got[:,0] == got[:,1]).all() and got[:,0].tolist() == shuffled(data)[:5].tolist()
    assert asked == [0, 1]
    assert dl.new().order is pairs and dl.new(order=None).get_idxs() == shuffled(data).tolist()
    dl.order = None
    assert dl.get_idxs() == shuffled(data).tolist()
    assert SparseDL(data, bs=2, order=pairs).get_idxs() == list(range(10))     # validation is not shuffled


def test_order_is_shared_out_among_processes():
    data, parts = Numbers(range(10)), []
    for rank in range(2):
        dl = SparseDL(data, bs=4, shuffle=True, drop_last=True, order=lambda d: shuffled(d)[::-1])
        dl.rank, dl.world, dl.n = rank, 2, 4
        parts.append(dl.get_idxs())
    assert np.stack(parts, 1).ravel().tolist() == shuffled(data)[::-1][:8].tolist()


def test_short_order():
    dl = SparseDL(Numbers(range(10)), bs=4, shuffle=True, drop_last=True, order=lambda d: np.arange(7))
    with pytest.raises(ValueError, match='7 indices for an epoch of 8'): dl.get_idxs()


# --- tags

def test_training_from_tags_reads_no_mask(src):
    tags = {i: [src.classes[c] for c in src.tags(i)] for i in src.splits['train']}
    bare = Source('bare', None, src.classes, src.splits, src.images, {i: src.masks[i] for i in src.splits['val']},
                  tag_table=tags)
    dls = sparse_dataloaders(bare, 'tag', size=32, bs=4, device='cpu')
    seen = torch.cat([t for _,_,t in dls.train])
    assert seen.sum(0).tolist() == np.sum([hot(src, i) for i in src.splits['train']], 0).tolist()
    assert (dls.valid.one_batch()[1] < 254).all()


def test_tags_are_found_once(src, monkeypatch):
    fresh = scenes(n_train=4, n_val=1, size=64)
    masks, read = dict(fresh.masks), []
    class Watched(dict):
        def __getitem__(self, id): read.append(id); return masks[id]
    fresh.masks = Watched(masks)
    ds = SparseDataset(fresh, fresh.splits['train'], 'scribble', size=(32, 32), augment=True)
    for ds.epoch in range(3): [ds[i] for i in range(4)]
    # each mask once: for its scribbles, and its tags with them
    assert sorted(read) == fresh.splits['train']


@pytest.mark.parametrize('table,annotation,message', [
    ({'b': ['one']}, 'tag', "neither tags nor labels say which classes are in 'a'"),
    ({'a': [], 'b': ['one']}, 'tag', 'no tag for 1 of 2 train images, such as a'),
    ({'a': ['three'], 'b': [0]}, 'tag', "tags of 'a': x has no class 'three', it has one, two"),
    ({'a': [0], 'b': [1]}, 'tag:novel=four', "no class 'four'"),
])
def test_what_is_wrong_is_said_before_training(table, annotation, message):
    image = np.zeros((8, 8, 3), np.uint8)
    bad = Source('x', None, ['one','two'], {'train': ['a','b'], 'val': ['c']}, dict(a=image, b=image, c=image),
                 {'c': image[...,0]}, tag_table=table)
    with pytest.raises((AnnotationError, FileNotFoundError), match=message) as e:
        sparse_dataloaders(bad, annotation, size=8, bs=2, device='cpu')
    assert '\n' not in str(e.value)


def test_hidden_masks_change_no_bit(src):
    "With the tags given, the pixels of novel classes are nowhere to be seen: nor would a mask without them be"
    ring = src.classes.index('plain ring')
    tags = {i: src.tags(i) for i in src.images}
    void = {i: np.where(m == ring, 255, m).astype(np.uint8) for i, m in src.masks.items()}
    weights = []
    for masks in (src.masks, void):
        s = Source('s', None, src.classes, src.splits, src.images, masks, tag_table=tags)
        learn = sparse_learner(sparse_dataloaders(s, 'dense:novel=plain ring', size=32, bs=4, device='cpu'),
                               'segformer_mit_b0', decoder_dim=16)
        batch = learn.dls.one_batch()
        with learn.no_bar(): learn.fit_poly(epochs=1)
        weights.append((*batch, *learn.model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    assert any(ring in t for t in tags.values())


def test_novel_classes_reach_the_metrics(src, tmp_path):
    "The log of a training, and its curves, have base, novel and harmonic; without novel classes they have not"
    from matplotlib import pyplot as plt
    from sasformer.learner import RunFolder
    from sasformer.train import plot_curves
    groups, more = src.groups('dense:novel=plain ring'), ['miou_base', 'miou_novel', 'miou_harmonic']
    def train(annotation, folder):
        dls = sparse_dataloaders(src, annotation, size=32, bs=4, device='cpu')
        learn = sparse_learner(dls, 'segformer_mit_b0', decoder_dim=16, cbs=RunFolder(folder))
        with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=2)
        return learn
    learn = train('dense:novel=plain ring', tmp_path/'novel')
    row, confusion = learn.run_folder.rows[-1], learn.confusion.total()
    assert [row[k] for k in more] == list(confusion.group_iou(groups).values())
    header = (tmp_path/'novel/log.csv').read_text().splitlines()[0]
    assert header.startswith('epoch,train_loss,valid_loss,miou,pixel_accuracy,mean_accuracy,'+','.join(more))
    fig = plot_curves(learn.run_folder.rows)
    drawn = {ax.get_title(): {l.get_label() for l in ax.lines} >= set(more) for ax in fig.axes}
    assert drawn == dict(losses=False, validation=True)
    plt.close(fig)
    assert not set(more) & train('dense', tmp_path/'all').run_folder.rows[-1].keys()


# --- the learner

def test_label_map_and_tags_are_targets(src):
    from fastai.callback.core import Callback
    seen = []
    class Look(Callback):
        def after_loss(self):
            labels, tags = self.learn.y
            assert labels is self.yb[0] and tags is self.yb[1] and len(self.xb) == 1
            assert type(labels) is type(tags) is torch.Tensor
            seen.append(abs(self.loss.item() - partial_cross_entropy(self.pred, labels).item()))
    learn = sparse_learner(sparse_dataloaders(src, 'scribble', size=32, bs=4, device='cpu'), 'segformer_mit_b0',
                           decoder_dim=16, cbs=Look())
    with learn.no_bar(): learn.fit_poly(epochs=1)
    assert len(seen) == 4 and max(seen) == 0
    preds, (labels, tags) = learn.get_preds()
    assert len(preds) == len(labels) == len(tags) == 4


@pytest.mark.parametrize('method', [SASFormerLoss, TreeEnergyLoss])
def test_methods_do_not_mind_a_training_without_labels(src, method):
    "From tags alone these losses see images without any label, and the cross-entropy is nothing"
    term = method()
    term.from_tags = True   # or the learner refuses such a training
    learn = sparse_learner(sparse_dataloaders(src, 'tag', size=32, bs=4, device='cpu'), 'segformer_mit_b0', term,
                           decoder_dim=16)
    with learn.no_bar(): learn.fit_poly(epochs=1)
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_what_people_look_at(src):
    learn = sparse_learner(sparse_dataloaders(src, 'scribble', size=32, bs=4, device='cpu'), 'segformer_mit_b0',
                           decoder_dim=16)
    b = learn.dls.one_batch()
    fig = learn.dls.show_batch(b, max_n=2) or learn.dls.train.show_batch(b, max_n=2)
    first = [src.classes[c] for c in b[2][0].nonzero().flatten().tolist()][0]
    assert fig.axes[0].get_title().startswith(f'image\n{first}')
    assert fig.axes[1].get_title() == 'labels'
    assert fig.axes[3].get_title()
    with learn.no_bar(): learn.show_results(max_n=2)
    learn.dls.train.show_batch(b[:2], max_n=2)                 # a batch without tags can be shown too


def test_aspect_is_the_released_one():
    "Width by height of the drawn scales lies in 0.9 to 1.1 and reaches both; their product is the scale's square"
    from sasformer.data import Geometry
    rng = np.random.default_rng(0)
    drawn = np.array([Geometry.random((50000, 60000), (32, 32), rng, scales=(.7, .7)).scale for _ in range(500)])
    ratio = drawn[:,1]/drawn[:,0]
    assert .8999 < ratio.min() < .905 and 1.095 < ratio.max() < 1.1001   # whole pixels
    assert np.allclose(drawn.prod(1), .49, atol=1e-4)


def test_the_limit_of_pixels_in_a_worker(monkeypatch):
    "A worker that is spawned gets a copy of the loader and a module that knows no limit"
    dl = SparseDL(Numbers(range(3)), bs=1)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 200)
    dl.before_iter()
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    pickle.loads(pickle.dumps(dl)).wif()
    assert Image.MAX_IMAGE_PIXELS == 200

class Numbers(list): seed, epoch = 0, 0
