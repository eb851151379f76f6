"Inference: sizes, scales, windows, evaluation, folders and their faults"
import copy, numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from torch import nn
from conftest import connected, fork_two
from sasformer.annotations import read_label_map
from sasformer.benchmarks import camvid
from sasformer.datasets import scenes
from sasformer.inference import (evaluate, evaluating, image_tensor, legend, multi_scale_logits, overlay, paper_scales,
                                 predict_folder, predict_image, predict_logits, window_starts)
from sasformer.metrics import ConfusionMatrix
from sasformer.segmenters import create_segmenter


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_segmenter('segformer_mit_b0', 6, decoder_dim=32)


@pytest.fixture
def photos(tmp_path):
    folder, rng = tmp_path/'photos', np.random.default_rng(0)
    folder.mkdir()
    for name, size in dict(a=(40, 50, 3), b=(33, 64, 3)).items():
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(folder/f'{name}.jpg')
    return folder


def run(model, *args, **kw): return predict_folder(model, *args, progress=False, **kw)


@pytest.mark.parametrize('size', [(64, 64), (65, 97), (9, 31), (200, 33)])
def test_any_size(model, size):
    x = torch.randn(1, 3, *size)
    for y in (predict_logits(model, x), predict_logits(model, x, multiple=32), multi_scale_logits(model, x, (.5, 1.))):
        assert y.shape == (1, 6, *size)


def test_padding_is_cut_off_where_it_was_put():
    "A model that copies its input shows where each pixel went"
    class Copy(nn.Conv2d):
        def forward(self, x): return x
    x = torch.randn(1, 3, 21, 37)
    torch.testing.assert_close(predict_logits(Copy(3, 3, 1), x, multiple=16), x)
    torch.testing.assert_close(predict_logits(Copy(3, 3, 1), x, window=(16, 13), overlap=.3), x)


def test_evaluation_against_sparse_labels(model):
    src = scenes(n_train=1, n_val=1, size=64)
    i, = src.splits['val']
    cm = evaluate(model, src, annotation='scribble', progress=False)
    assert cm.counts.sum() == (src.annotation(i, 'scribble') < 254).sum() < src.mask(i).size


def test_modes_and_gradients(model):
    model.train(); model.decoder.norm.eval()
    try:
        y = predict_logits(model, torch.randn(1, 3, 32, 32))
        assert not y.requires_grad and model.training and model.backbone.training and not model.decoder.norm.training
        with pytest.raises(RuntimeError), evaluating(model): raise RuntimeError
        assert model.training
    finally: model.train()


def test_multi_scale_is_its_definition(model):
    model, x, total = copy.deepcopy(model).double(), torch.randn(2, 3, 70, 91, dtype=torch.float64), 0
    with evaluating(model):
        for s in paper_scales:
            for mirror in (False, True):
                scaled = round(70*s), round(91*s)
                y = F.interpolate(x.flip(3) if mirror else x, scaled, mode='bilinear', align_corners=False)
                y = F.interpolate(model(y), (70, 91), mode='bilinear', align_corners=False).softmax(1)
                total = total + (y.flip(3) if mirror else y)/(2*len(paper_scales))
    eps = 91*torch.finfo(torch.float32).eps   # scores are resized in float32, with coordinates up to 91
    torch.testing.assert_close(multi_scale_logits(model, x).exp().double(), total, rtol=0, atol=eps)


def test_windows():
    for length in range(1, 90):
        for overlap in (0, .3, .9):
            starts = window_starts(length, 20, overlap)
            seen = np.zeros(length, int)
            for s in starts: seen[s:s+20] += 1
            assert seen.all() and starts[0] == 0 and starts[-1] == max(0, length-20) and len(set(starts)) == len(starts)
    with pytest.raises(ValueError, match='overlap=1'): window_starts(50, 20, 1)


def test_evaluate(model):
    src = scenes(n_train=1, n_val=2, size=48)
    n, cm = len(src.classes), ConfusionMatrix(len(src.classes))
    net = nn.Conv2d(3, n, 3, padding=1)
    for i in src.splits['val']:
        cm.update(torch.from_numpy(predict_image(net, src.image(i)))[None], torch.from_numpy(src.mask(i))[None])
    assert (evaluate(net, src, progress=False).counts == cm.counts).all()
    seen = []
    evaluate(net, src, progress=lambda ids: seen.extend(ids) or ids)
    assert seen == src.splits['val']
    with pytest.raises(ValueError, match="no split 'test'"): evaluate(net, src, 'test')
    del src.masks[seen[1]]
    with pytest.raises(ValueError, match=f'1 of the 2 images.*{seen[1]}'): evaluate(net, src, progress=False)


def test_camvid_at_full_size(model, data_dir):
    src = camvid(data_dir/'camvid')
    src.splits['val'] = src.splits['val'][:1]
    cm = evaluate(nn.Conv2d(3, len(src.classes), 1), src, progress=False)
    assert cm.counts.sum() == (src.mask(src.splits['val'][0]) < 254).sum()


def test_folder(model, photos, tmp_path):
    palette = np.arange(18, dtype=np.uint8).reshape(6, 3)*10
    report = run(model, photos, tmp_path/'out', palette, list('abcdef'))
    assert {p.relative_to(tmp_path/'out').as_posix() for p in (tmp_path/'out').rglob('*') if p.is_file()} == \
        {'a.png', 'b.png', 'overlays/a.jpg', 'overlays/b.jpg', 'overlays/legend.png'}
    assert report.masks == {photos/'a.jpg': tmp_path/'out/a.png', photos/'b.jpg': tmp_path/'out/b.png'}
    assert not report.skipped
    m = read_label_map(tmp_path/'out/b.png', n_classes=6, shape=(33, 64))
    assert (m == predict_image(model, photos/'b.jpg')).all()
    assert Image.open(tmp_path/'out/b.png').getpalette()[:18] == palette.flatten().tolist()


def test_folder_never_overwrites_unasked(model, photos, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out/b.png').write_text('mine')
    with pytest.raises(FileExistsError, match='b.png there already'): run(model, photos, tmp_path/'out')
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['b.png'] and (tmp_path/'out/b.png').read_text() == 'mine'
    run(model, photos, tmp_path/'out', overwrite=True)
    assert read_label_map(tmp_path/'out/b.png').shape == (33, 64)


def test_folder_faults_come_before_work(model, photos, tmp_path):
    out, data = tmp_path/'out', (photos/'a.jpg').read_bytes()
    (photos/'cut.jpg').write_bytes(data[:len(data)//2])
    with pytest.raises(OSError, match='cut.jpg'): run(model, photos, out)
    assert not out.exists()
    report = run(model, photos, out, on_error='skip')
    assert list(report.skipped) == [photos/'cut.jpg']
    assert 'truncated' in report.skipped[photos/'cut.jpg']
    assert len(report.masks) == 2
    (photos/'cut.jpg').unlink()
    Image.open(photos/'a.jpg').save(photos/'a.png')
    with pytest.raises(ValueError, match='a.png and .*a.jpg would have the same mask'):
        run(model, photos, tmp_path/'new')
    with pytest.raises(ValueError, match='holds the images'): run(model, photos/'b.jpg', photos)
    with pytest.raises(ValueError, match='only 1 colours'):
        run(model, photos/'b.jpg', tmp_path/'new', [[0, 0, 0]], ['a', 'b'])
    with pytest.raises(FileNotFoundError, match='gone'): run(model, photos/'gone.jpg', tmp_path/'new')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='at least one readable image'):
        run(model, tmp_path/'empty', tmp_path/'new')
    assert not (tmp_path/'new').exists()


def test_no_half_written_file_after_a_failure(photos, tmp_path):
    class Fails(nn.Conv2d):
        def forward(self, x):
            if x.shape[-1] == 64: raise RuntimeError('out of memory')
            return super().forward(x)
    with pytest.raises(RuntimeError, match='out of memory'): run(Fails(3, 6, 1), photos, tmp_path/'out')
    assert sorted(p.name for p in (tmp_path/'out').rglob('*') if p.is_file()) == ['a.jpg', 'a.png']


@pytest.mark.parametrize('orientation,turn', [
    (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)])
def test_masks_are_upright(model, tmp_path, orientation, turn):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.transpose(turn).save(tmp_path/'turned.png', exif=exif)
    run(model, tmp_path/'turned.png', tmp_path/'out')
    assert (read_label_map(tmp_path/'out/turned.png', shape=(40, 56)) == predict_image(model, image)).all()
    assert Image.open(tmp_path/'out/overlays/turned.jpg').size == (56, 40)


def test_overlay_and_legend():
    image, label_map = np.full((2, 2, 3), 100, np.uint8), np.array([[0, 1], [254, 255]], np.uint8)
    y = np.asarray(overlay(image, label_map, [[0, 0, 0], [200, 0, 100]], alpha=.25))
    assert y.tolist() == [[[75, 75, 75], [125, 75, 100]], [[100]*3, [100]*3]]
    with pytest.raises(ValueError, match='class 1, palette only 1'): overlay(image, label_map, [[0, 0, 0]])
    assert (200, 0, 100) in {c for _, c in legend(['one', 'two'], [[0, 0, 0], [200, 0, 100]]).getcolors(10**6)}


def test_image_tensor():
    x = image_tensor(np.zeros((2, 3, 3), np.uint8))
    assert x.shape == (1, 3, 2, 3) and torch.allclose(x[0, :, 0, 0], -torch.tensor([.485/.229, .456/.224, .406/.225]))
    with pytest.raises(ValueError, match='expected a uint8 array'): image_tensor(np.zeros((2, 3, 3)))


def share_an_evaluation():
    torch.manual_seed(0)
    src = scenes(n_train=1, n_val=3, size=48)
    net = torch.nn.Conv2d(3, len(src.classes), 3, padding=1)
    shared, alone = (evaluate(net, src, progress=False, distributed=d).counts for d in (True, False))
    assert (shared == alone).all()


def test_two_processes_share_an_evaluation():
    for p in fork_two(connected, share_an_evaluation): p.finish()


def test_bfloat16_takes_the_quick_attention(monkeypatch):
    "In every layer of a prediction in bfloat16 on a CPU that multiplies it; not in float32, nor on another CPU"
    from sasformer import quick
    calls, plain = [], quick.chunked_attention
    monkeypatch.setattr(quick, 'chunked_attention', lambda *a, **k: calls.append(1) or plain(*a, **k))
    model, x = create_segmenter('segformer_mit_b0', 3), torch.randn(1, 3, 64, 64)
    for can, dtype, expected in ((True, None, 0), (False, torch.bfloat16, 0), (True, torch.bfloat16, 8)):
        monkeypatch.setattr(quick, 'cpu_multiplies_bf16', lambda can=can: can)
        calls.clear()
        predict_logits(model, x, dtype=dtype)
        assert len(calls) == expected
