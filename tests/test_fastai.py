"fastai's own ways on the learner: they work, or a line says what does the same"
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from fastai.vision.all import DiceMulti, PILImage, SegmentationInterpretation, accuracy, foreground_acc
from sasformer.data import sparse_dataloaders
from sasformer.datasets import scenes
from sasformer.inference import predict_image
from sasformer.learner import RunFolder, sparse_learner


@pytest.fixture(scope='module')
def learn():
    dls = sparse_dataloaders(scenes(n_train=4, n_val=3, size=32), 'scribble', size=32, bs=2, device='cpu')
    torch.manual_seed(0)
    learn = sparse_learner(dls, 'segformer_mit_b0', decoder_dim=16, precision='fp32')
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=1)
    with learn.no_bar(): yield learn


@pytest.fixture(scope='module')
def whole(learn):
    "Scores and masks of the validation images, from the model itself"
    ds = learn.dls.valid.dataset
    images, masks = zip(*((np.asarray(a), np.asarray(b)) for a, b in map(ds.load, range(len(ds)))))
    return images, torch.tensor(np.stack(masks)).long()


def test_export_says_what_to_write(learn, tmp_path):
    with pytest.raises(NotImplementedError, match='save_segmenter.*load_segmenter'): learn.export(tmp_path/'x.pkl')
    with pytest.raises(NotImplementedError, match='predict_image.*scales=.*flip=True'): learn.tta()


def test_a_rate_is_found_beside_a_run_folder(learn, tmp_path):
    "Weights come back, and no run begins"
    learn.add_cb(RunFolder(tmp_path/'run'))
    before = [p.clone() for p in learn.model.parameters()]
    try:
        with learn.no_logging(): found = learn.lr_find(num_it=12, show_plot=False)
    finally: learn.remove_cb(RunFolder)
    assert 1e-7 < found.valley < 10 and not (tmp_path/'run').exists()
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))


@pytest.mark.parametrize('kind', ['path', 'PIL image', 'array', 'fastai image'])
def test_predict(learn, whole, tmp_path, kind):
    photo = whole[0][0]
    image = PILImage.create(photo)
    image.save(tmp_path/'a.png')
    items = {'path': tmp_path/'a.png', 'PIL image': Image.fromarray(photo), 'array': photo, 'fastai image': image}
    mask, same, p = learn.predict(items[kind])
    assert torch.equal(mask, same) and p.shape == (6, 32, 32)
    torch.testing.assert_close(p.sum(0), torch.ones(32, 32))
    assert (mask.numpy() == predict_image(learn.model, photo)).all()
    with pytest.raises(ValueError, match='expected a uint8 array'): learn.predict(photo[..., 0])


def test_test_dl_takes_ids(learn, tmp_path):
    ids = learn.dls.valid.dataset.ids
    preds, targets = learn.get_preds(dl=learn.dls.test_dl(ids[1:]))
    every = learn.get_preds()
    torch.testing.assert_close(preds, every[0][1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='a.jpg is no id of scenes; learn.predict'):
        learn.dls.test_dl([tmp_path/'a.jpg'])


def test_interpretation(learn, whole):
    i = SegmentationInterpretation.from_learner(learn)
    losses, order = i.top_losses()
    logits = learn.get_preds(act=lambda x: x)[0]
    full = F.interpolate(torch.as_tensor(logits), (32, 32), mode='bilinear')
    expected = torch.stack([F.cross_entropy(a[None], b[None], ignore_index=255) for a, b in zip(full, whole[1])])
    torch.testing.assert_close(torch.as_tensor(losses), expected.sort(descending=True)[0], rtol=1e-4, atol=1e-5)
    i.show_results([int(order[0])])


@pytest.mark.parametrize('metric', [foreground_acc, DiceMulti(), partial(accuracy, axis=1)])
def test_metrics(learn, whole, metric):
    "On all pixels, as all are labelled: against the same on enlarged scores"
    other = sparse_learner(learn.dls, learn.model, precision='fp32')
    other.metrics = metric
    with other.no_bar(): value = other.validate()[1]
    full = F.interpolate(torch.as_tensor(learn.get_preds(act=lambda x: x)[0]), (32, 32), mode='bilinear')
    pred, y = full.argmax(1), whole[1]
    if isinstance(metric, DiceMulti):
        both = [((pred == c) & (y == c)).sum().item() for c in range(6)]
        all_ = [(pred == c).sum().item()+(y == c).sum().item() for c in range(6)]
        expected = np.nanmean([2*b/a if a else np.nan for b, a in zip(both, all_)])
    else:
        on = (y > 0) if metric is foreground_acc else (y >= 0)
        part = lambda i: ((pred == y) & on)[i].sum()/on[i].sum()   # a mean over the batches
        expected = ((part(slice(0, 2))+part(slice(2, 3)))/2).item()
    assert value == pytest.approx(expected, rel=1e-5)
