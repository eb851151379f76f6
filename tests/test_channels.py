"Images of more than three channels, from files to masks"
import json
import numpy as np, pytest, tifffile, torch
from PIL import Image
from sasformer import evaluate, export, predict, train
from sasformer.annotations import AnnotationError, write_label_map
from sasformer.benchmarks import get_source
from sasformer.data import SparseDataset, colours_of, normalise, pixels, sparse_dataloaders
from sasformer.datasets import LayoutError, Source, folder, open_bands, open_image, picture
from sasformer.inference import predict_image
from sasformer.learner import load_segmenter, sparse_learner
from sasformer.segmenters import create_segmenter

def five(rng, mask):
    "Only the fifth channel knows the class"
    a = rng.normal(2000, 300, (*mask.shape, 5))
    a[..., 4] = np.where(mask, 9000, 400)+rng.normal(0, 100, mask.shape)
    return a.round().astype(np.uint16)

@pytest.fixture(scope='module')
def bands(tmp_path_factory):
    p, rng = tmp_path_factory.mktemp('bands'), np.random.default_rng(0)
    for d in ('images', 'masks'): (p/d).mkdir()
    (p/'codes.txt').write_text('soil\nwater\n')
    for i in range(10):
        mask = np.zeros((40, 48), np.uint8)
        y, x = rng.integers(0, 24, 2)
        mask[y:y+16, x:x+20] = 1
        tifffile.imwrite(p/f'images/{i}.tif', five(rng, mask), photometric='minisblack', planarconfig='contig')
        write_label_map(p/f'masks/{i}.png', mask)
    return p

small = ('--size', '32', '--bs', '4', '--epochs', '8', '--decoder_dim', '32', '--model', 'segformer_test_resnet',
         '--validate_every', '4', '--precision', 'fp32', '--lr', '3e-3')

@pytest.fixture(scope='module')
def run(bands):
    out = bands/'run'
    train.main(['--data', 'folder:shown=5+4+3', '--path', str(bands), '--annotation', 'dense', '--method',
                'tel', *small, '--out', str(out)])
    return out

def test_statistics_are_numpys(bands):
    src = folder(bands)
    assert src.channels == 5 and src.image('0').dtype == np.float32
    a = np.concatenate([tifffile.imread(bands/f'images/{i}.tif').reshape(-1, 5) for i in src.splits['train']])
    mean, std = (255*np.array(s) for s in src.statistics())
    np.testing.assert_allclose(mean, a.mean(0, dtype=float)); np.testing.assert_allclose(std, a.std(0, dtype=float))

def test_training_learns_from_the_fifth(run, bands):
    meta, result = (json.loads((run/f).read_text()) for f in ('model.json', 'result.json'))
    assert meta['config']['in_chans'] == 5 and len(meta['mean']) == 5 and meta['shown'] == [5, 4, 3]
    assert result['best_miou'] > .6   # everything soil: 0.42
    assert {'curves.png', 'examples.png'} <= {f.name for f in run.iterdir()}

def test_resumed_equals_uninterrupted(run, bands, tmp_path, monkeypatch):
    from sasformer.learner import RunFolder
    class Stopped(Exception): pass
    after = RunFolder.after_epoch
    def stop(self):
        after(self)
        if self.epoch == 3: raise Stopped
    args = ['--data', 'folder:shown=5+4+3', '--path', str(bands), '--annotation', 'dense', '--method',
            'tel', *small, '--out', str(tmp_path/'r')]
    with monkeypatch.context() as m:
        m.setattr(RunFolder, 'after_epoch', stop)
        with pytest.raises(SystemExit): train.main(args)
    state = torch.load(tmp_path/'r/state.pt', weights_only=True)
    assert state['statistics'] == folder(bands).statistics()
    train.main([*args, '--resume'])
    one, two = (load_segmenter(d/'last.safetensors') for d in (run, tmp_path/'r'))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert one.mean == two.mean and one.std == two.std

def test_prediction_and_evaluation(run, bands, tmp_path, capsys):
    predict.main([str(run), str(bands/'images'), '--out', str(tmp_path/'m'), '--device', 'cpu'])
    assert len(list((tmp_path/'m').glob('*.png'))) == 10 and (tmp_path/'m/overlays/0.jpg').exists()
    evaluate.main([str(run), '--out', str(tmp_path/'e.json'), '--device', 'cpu', '--precision', 'fp32'])
    assert json.loads((tmp_path/'e.json').read_text())['miou'] > .6
    model, src = load_segmenter(run), folder(bands)
    whole = predict_image(model, bands/'images/0.tif')
    assert np.array_equal(whole, predict_image(model, src.image('0')))
    assert predict_image(model, bands/'images/0.tif', window=32).shape == whole.shape

def test_export_takes_what_the_model_takes(bands):
    model = create_segmenter('segformer_test_resnet', 2, decoder_dim=32, in_chans=5).eval()
    model.mean, model.std = folder(bands).statistics()
    p = export.PhotographModel(model)(torch.tensor(open_bands(bands/'images/0.tif', 5)).permute(2, 0, 1)[None])
    assert np.array_equal(p[0].argmax(0), predict_image(model, bands/'images/0.tif'))

def test_another_number_is_refused(run, bands, tmp_path):
    Image.new('RGB', (40, 40)).save(tmp_path/'rgb.jpg')
    with pytest.raises(OSError, match='rgb.jpg: has 3 channels, expected 5'):
        predict_image(load_segmenter(run), tmp_path/'rgb.jpg')
    with pytest.raises(ValueError, match=r'array \(H, W, 5\), got uint8 \(4, 4, 3\)'):
        pixels(np.zeros((4, 4, 3), np.uint8), load_segmenter(run))
    with pytest.raises(OSError, match='0.tif: cannot be read as an image.*folder:channels=N'):
        open_image(bands/'images/0.tif')
    with pytest.raises(OSError, match='images/.*.tif: has 5 channels, expected 4'):
        sparse_dataloaders(get_source('folder:channels=4', bands), 'dense', 32, 2)
    dls = sparse_dataloaders(folder(bands), 'dense', 32, 2)
    with pytest.raises(ValueError, match='folder have 5 channels, the model takes 3: create_segmenter'):
        sparse_learner(dls, create_segmenter('segformer_mit_b0', 2, decoder_dim=32))
    for wrong, said in (('channels=many', 'expected how many channels'), ('shown=1+2+6', 'of the channels 1 to 5'),
                        ('value_range=0+9', 'or grey; of 5 each is normalised')):
        with pytest.raises(AnnotationError, match=said): get_source(f'folder:{wrong}', bands)

@pytest.mark.parametrize('kind', ['uint8', 'float32', 'pages', 'separate', 'npy', 'png', 'grey'])
def test_files(tmp_path, kind):
    a = np.random.default_rng(1).integers(0, 200, (6, 8, dict(png=4, grey=1).get(kind, 7))).astype(np.uint8)
    f = tmp_path/'a.tif'
    if kind == 'npy': np.save(f := tmp_path/'a.npy', a.astype(np.int32))
    elif kind in ('png', 'grey'): Image.fromarray(a.squeeze()).save(f := tmp_path/'a.png')
    elif kind in ('pages', 'separate'):
        tifffile.imwrite(f, a.transpose(2, 0, 1), photometric='minisblack',
                         planarconfig='separate' if kind == 'separate' else None)
    else: tifffile.imwrite(f, a.astype(kind), photometric='minisblack', planarconfig='contig')
    assert np.array_equal(open_bands(f, a.shape[2]), a)
    assert picture(a, None).shape == (6, 8, 3)

@pytest.mark.parametrize('how', ['lzw', 'zstd', 'deflate'])
def test_packed_files(tmp_path, how, monkeypatch):
    "What most programs write; without the package that unpacks it, its name is said"
    pytest.importorskip('imagecodecs', reason="imagecodecs is not here: packed TIFFs are not tested")
    a = np.random.default_rng(1).integers(0, 200, (16, 16, 5), dtype=np.uint8)
    tifffile.imwrite(tmp_path/'a.tif', a, photometric='minisblack', planarconfig='contig', compression=how)
    assert np.array_equal(open_bands(tmp_path/'a.tif', 5), a)
    def missing(self): raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")
    monkeypatch.setattr(tifffile.TiffPageSeries, 'asarray', missing)
    with pytest.raises(OSError, match=r'a.tif: .*LZW.*pip install "sasformer\[tiff\]"$'):
        open_bands(tmp_path/'a.tif', 5)

@pytest.mark.parametrize('name', [
    'segformer_swin_tiny_patch4_window7_224', 'segformer_hrnet_w18_small', 'ltf_efficientnet_lite0',
    'linear_vit_tiny_patch16_224', 'setr_vit_tiny_patch16_224', 'segmenter_vit_tiny_patch16_224',
    'deeplabv3plus_resnet18', 'maskformer_mit_b0'])
def test_every_kind_of_backbone_takes_them(bands, name):
    "A step of training on five channels"
    dls = sparse_dataloaders(folder(bands), 'dense', 64, 4, device='cpu')
    options = dict(decoder_dim=64, n_queries=4, n_layers=1) if 'maskformer' in name else {}
    method = 'maskformer' if 'maskformer' in name else 'sasformer' if '_vit' in name else 'tel'
    learn = sparse_learner(dls, name, method, precision='fp32', **options)
    before = [p.clone() for p in learn.model.backbone.parameters()][:1]
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=1)
    first = next(iter(learn.model.backbone.parameters()))
    assert learn.model.config['in_chans'] == 5 and np.isfinite(learn.recorder.losses[-1].item())
    assert not torch.equal(first, before[0])

def test_what_says_nothing_is_refused(tmp_path):
    a = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    a[0, 0, 0] = np.nan
    np.save(tmp_path/'a.npy', a)
    with pytest.raises(OSError, match='a.npy: has pixels that are no numbers'): open_bands(tmp_path/'a.npy', 6)
    a[..., 0] = 7
    src = Source('six', None, ['a', 'b'], dict(train=['x']), dict(x=a), dict(x=np.zeros((4, 5), np.uint8)), channels=6)
    with pytest.raises(LayoutError, match='six: channel 1 of 6 is 7 at every pixel of the 1 training images'):
        src.statistics()
    with pytest.raises(OSError, match='b.tif: '):
        (tmp_path/'b.tif').write_bytes(b'II*\0junk'); open_bands(tmp_path/'b.tif', 5)

def test_brightness_and_colours(bands):
    "A step of brightness is as large a part of a channel's spread as in photographs; padding is the mean"
    src = folder(bands)
    ds = SparseDataset(src, src.splits['train'], size=(64, 64), augment=False)
    x = normalise(ds[0][0], src.statistics())
    assert x.shape == (5, 64, 64) and x[:, 0, 0].abs().max() < 1e-3 and ds.unit.shape == (5,)
    model = create_segmenter('segformer_mit_b0', 2, decoder_dim=32, in_chans=5)
    assert colours_of(torch.zeros(1, 5, 4, 4), model)[0, :, 0, 0].tolist() == pytest.approx([.485, .456, .406])

def test_weights_of_three_channels_are_adapted(tmp_path):
    from safetensors.torch import save_file
    import timm
    three = timm.create_model('mit_b0')
    save_file(three.state_dict(), tmp_path/'b0.safetensors')
    model = create_segmenter('segformer_mit_b0', 2, weights=str(tmp_path/'b0.safetensors'), decoder_dim=32, in_chans=5)
    w, w5 = three.patch_embed.proj.weight, model.backbone.patch_embed.proj.weight
    assert torch.allclose(w5[:, :3], w*3/5) and torch.allclose(w5[:, 3:], w[:, :2]*3/5)
