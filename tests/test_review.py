"Faults that readers of the source found: each with the input that showed it"
import contextlib, copy, dataclasses, io, json, subprocess, sys, warnings
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from conftest import connected, fork_two
from fastai.callback.core import Callback
from PIL import Image
from timm.layers import BatchNormAct2d
import sasformer.sasformer as sf
from sasformer import downloads, evaluate, labels, measure, train
from sasformer.afa import AFALoss
from sasformer.annotate import LabelSet, Training, set_classes, set_folder
from sasformer.annotations import AnnotationError, draw_lines, image_seed, read_label_map, write_label_map
from sasformer.data import pixels, sparse_dataloaders
from sasformer.datasets import LayoutError, Source, folder, open_bands, scenes, write_tags
from sasformer.inference import image_tensor, multi_scale_logits, predict_folder, predict_image, scales_of
from sasformer.label_tools import box_mask, polygon_mask, run_mask
from sasformer.learner import (CPUSyncBatchNormAct, focal_loss, load_segmenter, parameter_groups, save_segmenter,
                               sparse_learner)
from sasformer.paper import result_table
from sasformer.recipes import recipe
from sasformer.segmenters import create_segmenter
from sasformer.simformer import SimilarityNetwork, similarity_loss
from sasformer.train import example_sheet
from sasformer.treefilter import each_image

@pytest.fixture(scope='module')
def model(): return create_segmenter('segformer_test_resnet', 3, decoder_dim=16).eval()

@pytest.fixture
def image(): return np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8)

def test_images_whose_strides_run_backwards(model, image):
    assert np.array_equal(predict_image(model, image[..., ::-1]), predict_image(model, image[..., ::-1].copy()))
    assert np.array_equal(predict_image(model, image[:, ::-1]), predict_image(model, image[:, ::-1].copy()))

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_models_of_other_precision_predict(image, dtype):
    torch.manual_seed(0)
    model = create_segmenter('segformer_test_resnet', 3, decoder_dim=16).eval()
    expected = predict_image(model, image)
    assert (predict_image(model.to(dtype), image) == expected).mean() > (.999 if dtype == torch.float64 else .8)

def test_windows_of_numpys_numbers(model, image):
    assert np.array_equal(predict_image(model, image, window=np.int64(32)), predict_image(model, image, window=32))

@pytest.mark.parametrize('counts', [[2**62]*4+[24], [2**63-1, 2, 23], [.5, 23.5], [2**70]])
def test_run_lengths_that_wrap_round(counts):
    with pytest.raises(AnnotationError): run_mask(dict(size=[4, 6], counts=counts), (4, 6), 'runs')
    with pytest.raises(AnnotationError): box_mask((counts, (0, 0, 6, 4)), (4, 6), 'mask')

def test_points_with_a_third_number():
    with pytest.raises(AnnotationError, match='corners x, y'):
        polygon_mask([[0, 0, 1], [5, 0, 1], [5, 5, 1], [0, 5, 1]], (10, 10))
    assert polygon_mask([0, 0, 5, 0, 5, 5, 0, 5], (10, 10)).sum() == 25   # COCO's: numbers in a row

@pytest.mark.parametrize('far', [1e10, 1e300, float('nan')])
def test_lines_to_places_far_away(far):
    with pytest.raises(AnnotationError, match='expected positions in pixels'):
        draw_lines([(0, [(1, 1), (far, 3)])], (10, 10), 3, 'crop')

def lvis(path, category):
    "COCO's format with 300 categories"
    square = [0, 0, 3, 0, 3, 3, 0, 3]
    path.write_text(json.dumps(dict(images=[dict(id=1, file_name='a.jpg', height=6, width=8)],
        categories=[dict(id=k, name=f'c{k}') for k in range(300)],
        annotations=[dict(id=1, image_id=1, category_id=category, segmentation=[square])])))
    return path

def test_more_classes_than_a_label_map_holds(tmp_path, capsys):
    for category in (254, 255, 299):
        with pytest.raises(SystemExit):
            labels.main(f"convert {lvis(tmp_path/'l.json', category)} --out {tmp_path/'out'}".split())
        assert f'number {category+1} of 300, a label map holds 254' in capsys.readouterr().err
    labels.main(f"convert {lvis(tmp_path/'l.json', 253)} --out {tmp_path/'out'}".split())
    assert read_label_map(tmp_path/'out/a.png')[1, 1] == 253

def test_converted_labels_do_not_replace_what_they_come_from(tmp_path, capsys):
    (tmp_path/'strokes/sub').mkdir(parents=True)
    file = tmp_path/'strokes/sub/a.png'
    Image.new('RGB', (8, 6), (255, 0, 0)).save(file)
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        labels.main(f"convert {tmp_path/'strokes'} --colours 000000:0+ff0000:1 --out {file.parent} --overwrite".split())
    assert 'is itself read' in capsys.readouterr().err and file.read_bytes() == before

def test_an_orientation_that_there_is_not(tmp_path):
    (tmp_path/'images').mkdir(); (tmp_path/'masks').mkdir()
    exif, a = Image.Exif(), np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif[0x0112] = 9
    Image.fromarray(a).save(tmp_path/'images/a.png', exif=exif)
    Image.fromarray(a).convert('RGB').save(tmp_path/'b.jpg', exif=exif)
    assert np.array_equal(open_bands(tmp_path/'images/a.png', 1)[..., 0], a)
    assert Source('one', None, ['x'], {}, dict(b=tmp_path/'b.jpg'), {}).shape('b') == (4, 6)

def test_tags_of_an_image_without_any(tmp_path, capsys):
    "Are not written as a row that cannot be read"
    for d in ('images', 'masks'): (tmp_path/d).mkdir()
    (tmp_path/'codes.txt').write_text('road\nsky\n')
    for i in range(4):
        Image.new('RGB', (8, 6)).save(tmp_path/f'images/{i}.png')
        write_label_map(tmp_path/f'masks/{i}.png', np.full((6, 8), 255 if i == 0 else i % 2, np.uint8))
    src = folder(tmp_path)
    assert write_tags(src, tmp_path/'t.csv') == ['0'] and '0,' not in (tmp_path/'t.csv').read_text().splitlines()
    labels.main(f"tags --data folder --path {tmp_path} --out {tmp_path/'tags.csv'}".split())
    assert '3 images; 1 have none and are left out, such as 0' in capsys.readouterr().out
    with pytest.raises(LayoutError, match='no tags for 1 of 4 images, such as 0'): folder(tmp_path)   # it says which

def test_names_of_images_that_are_no_text(): assert image_seed(0, 'caf\udce9.png') != image_seed(0, 'caf.png')

def test_class_names_with_a_sign_of_formulas(tmp_path):
    for d in ('images', 'masks'): (tmp_path/d).mkdir()
    (tmp_path/'codes.txt').write_text('note $x_$\nsky\n')
    for i in range(4):
        Image.new('RGB', (8, 6)).save(tmp_path/f'images/{i}.png')
        write_label_map(tmp_path/f'masks/{i}.png', np.full((6, 8), i % 2, np.uint8))
    labels.main(f"stats --data folder --path {tmp_path} --annotation dense --out {tmp_path/'counts'}".split())
    assert (tmp_path/'counts/labels.png').stat().st_size > 0

def test_sets_of_the_annotating_page(tmp_path):
    "Names of classes in either form of Unicode; a folder under runs/ that is not the page's"
    (tmp_path/'photos').mkdir()
    Image.new('RGB', (8, 6)).save(tmp_path/'photos/a.png')
    root = set_folder(tmp_path/'photos')
    assert set_classes(root, ['e\u0301', 'b']) == set_classes(root, ['e\u0301', 'b']) == set_classes(root) == ['é', 'b']
    training = Training(LabelSet(root, ['é', 'b']))
    (root/'runs/001').mkdir(parents=True)
    assert training.state()['status'] == 'none'

def test_sasformer_data_is_a_program_like_the_others(monkeypatch, capsys):
    r = subprocess.run(f'{sys.executable} -u -m sasformer.downloads list | head -1', shell=True, capture_output=True,
                       text=True)
    assert 'Traceback' not in r.stderr and len(r.stderr.splitlines()) <= 1, r.stderr
    def interrupted(name): raise KeyboardInterrupt
    monkeypatch.setattr(downloads, '_listed', interrupted)
    with pytest.raises(SystemExit) as e: downloads.main(['list'])
    assert e.value.code == 130 and 'the next call goes on from there' in capsys.readouterr().err

@pytest.mark.parametrize('length,whole', [('10', 15), (None, None)])
def test_a_server_that_does_not_say_how_long_the_whole_is(monkeypatch, length, whole):
    class Answer:
        status, headers = 206, {'Content-Range': 'bytes 5-14/*'} | ({'Content-Length': length} if length else {})
    monkeypatch.setattr(downloads.urllib.request, 'urlopen', lambda *a, **kw: Answer())
    assert downloads._request('http://x', 5, 'tag', 1)[1:] == (5, whole)


# Of training

def learner(annotation='scribble', method='baseline', n=8, bs=4, model='segformer_mit_b0', size=64, cbs=None, **kw):
    src = scenes(n_train=n, n_val=2, size=size)
    if model == 'segformer_mit_b0': kw = dict(last_stride=1, decoder_dim=32) | kw
    dls = sparse_dataloaders(src, annotation, size, bs, device='cpu')
    return sparse_learner(dls, model, method, cbs=cbs, **dict(precision='fp32')|kw)

def quietly(f, *args, **kw):
    with contextlib.redirect_stdout(io.StringIO()) as out: f(*args, **kw)
    return out.getvalue()

@pytest.mark.parametrize('methods', ['afa+sasformer', 'sasformer+afa'])
def test_a_method_that_runs_the_model_again(methods):
    "The attention of the affinity loss is the prediction's, in either order"
    seen, original = [], sf.affinity_loss
    def look(blocks, logits, *args):
        seen.append([l.q.shape[0] for b in blocks.values() for l in b])
        return original(blocks, logits, *args)
    both = '+'.join(m if m == 'sasformer' else 'afa:labels_from=0,propagated_from=0,freeze_norms=false'
                    for m in methods.split('+'))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sf, 'affinity_loss', look)
        quietly(learner('tag', both).fit, 1)
    assert seen and all(n == 4 for images in seen for n in images)

def test_accumulated_gradients_are_of_the_whole_loss():
    from fastai.callback.training import GradientAccumulation
    grads = {}
    for n in (4, 8):
        learn = learner(method='sasformer', n=4, dropout=0., drop_path_rate=0., cbs=[GradientAccumulation(n)])
        class Keep(Callback):
            order, run_valid = 7, False
            def after_loss(self): grads[n] = self.learn.loss_grad.item()
        quietly(learn.fit, 1, lr=0., cbs=Keep())
    assert grads[8] == pytest.approx(grads[4]/2, rel=1e-5)

def test_validation_outside_of_a_training_leaves_the_run_alone(tmp_path):
    r = recipe('scenes', data='scenes:n_train=8,n_val=2,size=64', size=64, bs=4, epochs=1, method='baseline',
               precision='fp32')
    learn = r.learner(folder=tmp_path/'run', device='cpu')
    said = quietly(learn.validate)
    assert not (tmp_path/'run').exists() and 'valid_loss' not in said
    quietly(r.run, learn)
    files = {f: f.read_bytes() for f in (tmp_path/'run').iterdir()}
    quietly(learn.validate); quietly(learn.get_preds)
    assert files == {f: f.read_bytes() for f in (tmp_path/'run').iterdir()} and (tmp_path/'run/result.json') in files

def test_freezing_is_of_the_backbone():
    learn = learner()
    learn.freeze()
    assert all(p.requires_grad for p in learn.model.decoder.parameters())
    assert not any(p.requires_grad for n, p in learn.model.backbone.named_parameters() if p.ndim > 1)

def test_fastais_trackers_pass_over_epochs_without_validation(tmp_path):
    from fastai.callback.tracker import EarlyStoppingCallback
    learn = learner(validate_every=2, cbs=[EarlyStoppingCallback(monitor='miou', patience=5)])
    assert 'nan' not in quietly(learn.fit, 3)
    assert np.isnan(learn.recorder.values[0][1]) and np.isfinite(learn.recorder.values[1][1])

@pytest.mark.parametrize('gamma', [0, .5, 1, 2])
def test_focal_loss_of_a_certain_pixel(gamma):
    scores = torch.tensor([[20., 0, 0], [0., 1, 2]], requires_grad=True)
    loss = focal_loss(scores, torch.tensor([0, 1]), torch.ones(3), gamma)
    loss.backward()
    logp = scores.detach().log_softmax(1)[[0, 1], [0, 1]]
    assert loss.item() == pytest.approx((-(1-logp.exp())**gamma*logp).mean().item(), abs=1e-6)
    assert scores.grad.isfinite().all()

def test_a_compiled_model_is_saved_without_its_wrapper(tmp_path):
    model = create_segmenter('segformer_test_resnet', 3, decoder_dim=16)
    save_segmenter(torch.compile(model), tmp_path)
    again = load_segmenter(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())

def test_similarity_loss_without_base_pixels_for_long():
    net = SimilarityNetwork(8, 8, 1, memory=2)
    for _ in range(4): assert similarity_loss(net, torch.randn(2, 1, 4, 8), torch.full((2, 1, 4), 255)).item() == 0

@pytest.mark.parametrize('given', [dict(loss='dice'), dict(class_weights=[1.]*6), dict(loss_at='scores')])
def test_options_of_a_loss_that_is_replaced(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} is of the labelled pixels' loss, and MaskFormerLoss"):
        learner('dense', 'maskformer', model='maskformer_test_resnet', decoder_dim=64, n_queries=4, n_layers=1, **given)

def test_a_second_learner_on_a_model_takes_its_own_options():
    first = learner('tag', 'afa:freeze_norms=false')
    second = sparse_learner(first.dls, first.model, 'afa:pooling=average,freeze_norms=false', precision='fp32')
    assert second.model.auxiliary['afa'].pooling == 'average'

def test_weight_decay_spares_embeddings_of_a_vit():
    model = create_segmenter('segmenter_vit_tiny_patch16_224', 6, img_size=64)
    groups, names = parameter_groups(model), {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in (groups[0], groups[2]) for p in g}
    assert not decayed & {'backbone.model.pos_embed', 'backbone.model.cls_token', 'decoder.tokens'}
    assert sum(map(len, groups)) == len(names) and any('qkv.weight' in n for n in decayed)

def test_a_class_that_never_occurs_in_a_table():
    df = pd.DataFrame([dict(variant='v', seed=s, miou=.5, iou=dict(a=.5, b=None)) for s in (0, 1)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert result_table(df).a.iloc[0] == 50 and np.isnan(result_table(df).b.iloc[0])

def test_examples_are_of_the_scored_size():
    learn, seen = learner(val_scale=.5), []
    hook = learn.model.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape[-2:])))
    example_sheet(learn, 1)
    hook.remove()
    assert seen == [(32, 32)]

def test_kernels_take_batches_of_one_length():
    with pytest.raises(ValueError, match='expected as many of each'):
        each_image(lambda a, b: 0, torch.zeros(2, 3), torch.zeros(1, 3))

def test_bench_on_another_device_is_refused():
    for what in ('afa', 'tree'):
        with pytest.raises(ValueError, match='measured on the CPU'):
            getattr(measure, f'bench_{what}')(SimpleNamespace(device='cuda'))

def test_afa_given_to_a_fit():
    learn = learner('scribble', 'baseline')
    with pytest.raises(RuntimeError, match='AFALoss trains layers of its own: pass it when the learner is made'):
        quietly(learn.fit, 1, cbs=AFALoss())

def share_a_batch():
    "Timm's norm with an activation in it, on half a batch: what it is on the whole"
    torch.manual_seed(0)
    whole, x = BatchNormAct2d(6, act_layer=torch.nn.ReLU6), torch.randn(4, 6, 5, 4)*3+1
    shared, rank = copy.deepcopy(whole), torch.distributed.get_rank()
    shared.__class__ = CPUSyncBatchNormAct
    mine = x[2*rank:2*rank+2].clone().requires_grad_()
    expected = whole(x.requires_grad_())
    expected.sum().backward()
    found = shared(mine)
    found.sum().backward()
    part = slice(2*rank, 2*rank+2)
    torch.testing.assert_close(found, expected[part])
    torch.testing.assert_close(mine.grad, x.grad[part], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shared.running_var, whole.running_var)

def test_norms_with_an_activation_are_shared_by_processes():
    for p in fork_two(connected, share_a_batch): p.finish()

def test_the_size_of_validation_stays_with_the_model(tmp_path, image):
    "In its file, in the learner's predictions, and in those of a photograph"
    dls = sparse_dataloaders(scenes(n_train=2, n_val=2, size=32), 'scribble', size=32, bs=2, device='cpu')
    learn = sparse_learner(dls, 'segformer_test_resnet', decoder_dim=16, val_scale=.9)
    save_segmenter(learn.model, tmp_path, classes=dls.vocab)
    model, x = load_segmenter(tmp_path), image_tensor(image, learn.model)
    assert model.val_scale == .9 and scales_of(model) == (.9,)
    mask, _, p = learn.predict(image)
    torch.testing.assert_close(p, multi_scale_logits(model, x, (.9,), flip=False)[0].exp(), atol=1e-6, rtol=1e-5)
    assert (p-multi_scale_logits(model, x, (1.,), flip=False)[0].exp()).abs().max() > 1e-4
    assert np.array_equal(mask.numpy(), predict_image(model, image))

def test_a_finished_training_teaches_whatever_the_scales_of_its_labels():
    "They mean something to self-training alone"
    first = recipe('simformer_ade20k_1', path='ADE')
    assert len(first.pseudo_scales) == 5 and first.settings()['pseudo_scales'] == [1.]
    again = recipe('simformer_ade20k_1', path='ADE', self_train=True)
    assert len(again.settings()['pseudo_scales']) == 5
    assert dataclasses.replace(again, self_train=False).settings() == first.settings()

@pytest.fixture
def tagged(tmp_path):
    "Photographs with tags and no mask"
    rng, root = np.random.default_rng(0), tmp_path/'tagged'
    (root/'images').mkdir(parents=True)
    for i in range(6): Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(root/f'images/{i}.png')
    (root/'codes.txt').write_text('background\ncow\nsky\n')
    (root/'tags.csv').write_text('image,tags\n'+''.join(f'{i},{"cow" if i%2 else "sky"}\n' for i in range(6)))
    return root

TAGS = '--annotation tag --size 64 --bs 4 --epochs 1 --precision fp32 --device cpu'.split()
AFA = ['--model', 'segformer_test_resnet', '--method', 'afa:affinity=0,labels_from=0,cam_scales=1']

def test_tags_alone_without_a_mask_to_measure_with(tagged, tmp_path, capsys):
    "A run ends without an mIoU; its label maps replace no file of the set; what was measured on is noticed"
    said = refused(train.main, ['--data', 'folder', '--path', str(tagged), '--out', str(tmp_path/'scribbles')], capsys)
    assert f"{tagged} has no masks to take it from; it has labels of the kind tag: --annotation tag" in said
    train.main(['--data', 'folder', '--path', str(tagged), *TAGS, *AFA, '--out', str(tmp_path/'run')])
    result = json.loads((tmp_path/'run/result.json').read_text())
    assert result['miou'] is None and result['iou'] == {} and (tmp_path/'run/examples.png').exists()
    pseudo = ['pseudo', str(tmp_path/'run'), '--stage', 'cam', '--out']
    photograph = (tagged/'images/0.png').read_bytes()
    assert refused(labels.main, [*pseudo, str(tagged/'images'), '--overwrite'], capsys).endswith('for --out')
    assert photograph == (tagged/'images/0.png').read_bytes()
    labels.main([*pseudo, str(tagged/'masks')])
    capsys.readouterr()
    evaluate.main([str(tmp_path/'run')])
    assert 'the images or their split have changed since the training' in capsys.readouterr().out
    dense = ['--annotation', 'dense', '--method', 'baseline', '--size', '64', '--out', str(tmp_path/'dense')]
    said = refused(train.main, ['--data', 'folder', '--path', str(tagged), *dense], capsys)
    assert f"{tagged}: no mask for" in said and "annotation='best'" in said

def refused(main, args, capsys):
    "The one line with which a program ends"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main(args)
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and '\n' not in said
    return said

@pytest.mark.parametrize('method', ['baseline', 'sasformer', 'tel+crf'])
def test_tags_need_a_method_that_learns_from_them(tagged, tmp_path, method, capsys):
    args = ['--data', 'folder', '--path', str(tagged), *TAGS, '--method', method, '--out', str(tmp_path/'run')]
    assert 'a method that learns from tags, such as afa' in refused(train.main, args, capsys)

def test_the_range_of_values_stays_with_the_model(tmp_path):
    "Photographs of 12 bits: the learner, a file of the model, a path and a Pillow image give one prediction"
    rng = np.random.default_rng(0)
    for kind in ('images', 'masks'): (tmp_path/kind).mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 4096, (40, 48), np.uint16)).save(tmp_path/f'images/{i}.png')
        write_label_map(tmp_path/f'masks/{i}.png', rng.integers(0, 2, (40, 48), np.uint8))
    (tmp_path/'codes.txt').write_text('a\nb\n')
    src = folder(tmp_path, value_range='0+4095')
    learn = sparse_learner(sparse_dataloaders(src, 'dense', size=32, bs=2, device='cpu'), 'segformer_test_resnet',
                           decoder_dim=16)
    save_segmenter(learn.model, tmp_path/'run', classes=src.classes)
    model, file = load_segmenter(tmp_path/'run'), tmp_path/'images/0.png'
    seen = pixels(src.image('0'), model)
    assert seen.std() > 60
    for image in (file, Image.open(file)): assert np.array_equal(pixels(image, model), seen)
    torch.testing.assert_close(learn.predict(file)[2], learn.predict(src.image('0'))[2])

def test_pillow_images_are_read_as_their_files(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 65536, (9, 7), np.uint16)).save(tmp_path/'grey16.png')
    Image.fromarray(rng.integers(0, 256, (9, 7, 4), np.uint8)).save(tmp_path/'rgba.png')
    for file in tmp_path.glob('*.png'): assert np.array_equal(pixels(file), pixels(Image.open(file))), file

def test_folders_of_arrays_and_of_hidden_files(tmp_path, model):
    for sub in ('npy', 'png', 'out'): (tmp_path/sub).mkdir()
    np.save(tmp_path/'npy/a.npy', np.random.default_rng(0).random((40, 48, 5), np.float32))
    five = create_segmenter('segformer_test_resnet', 3, decoder_dim=16, in_chans=5).eval()
    five.mean, five.std = (.5,)*5, (.2,)*5
    report = predict_folder(five, tmp_path/'npy', tmp_path/'out', progress=False, overlays=False)
    assert [f.name for f in report.masks] == ['a.npy']
    Image.new('RGB', (40, 40)).save(tmp_path/'png/b.png')
    (tmp_path/'png/._b.png').write_bytes(b'of macOS')
    report = predict_folder(model, tmp_path/'png', tmp_path/'out', progress=False, overlays=False)
    assert [f.name for f in report.masks] == ['b.png'] and not report.skipped

def test_names_of_classes_beside_the_data(tmp_path, monkeypatch):
    "A file that the data's folder holds is found from anywhere"
    for kind in ('images', 'masks'): (tmp_path/kind).mkdir()
    for i in range(6):
        Image.new('RGB', (8, 8)).save(tmp_path/f'images/{i}.png')
        write_label_map(tmp_path/f'masks/{i}.png', np.zeros((8, 8), np.uint8))
    (tmp_path/'names.txt').write_text('a\nb\n')
    monkeypatch.chdir('/')
    assert folder(tmp_path, classes='names.txt').classes == ['a', 'b']

def test_factors_and_lengths_that_are_none(model, image):
    for scales in ((0,), (-1,), (float('nan'),)):
        with pytest.raises(ValueError, match='expected factors above 0'): predict_image(model, image, scales)
    learn = learner('scribble', 'baseline')
    with pytest.raises(ValueError, match='epochs=0: expected 1 or more'): learn.fit_poly(epochs=0)
    with pytest.raises(ValueError, match='warmup=5: expected a share'): learn.fit_poly(epochs=1, warmup=5)

def measured(learn):
    with contextlib.redirect_stdout(io.StringIO()): return list(learn.validate())

def test_learners_that_share_their_loaders_each_normalise_for_themselves():
    first = learner()
    before, seen = measured(first), first.dls.valid.one_batch()[0].mean()
    model = create_segmenter('segformer_test_resnet', 6, decoder_dim=16)
    model.mean, model.std = (.1, .2, .3), (.9, .9, .9)
    second = sparse_learner(first.dls, model, precision='fp32')
    assert abs(second.dls.valid.one_batch()[0].mean()-seen) > .1
    assert measured(first) == before

class Broken(Exception): pass

@pytest.mark.parametrize('precision', ['bf16', 'fp32'])
def test_an_interrupted_validation_leaves_nothing_on(precision):
    from torch.overrides import _get_current_function_mode_stack
    def stop(*_): raise Broken
    learn = learner(model='segformer_mit_b0', precision=precision)
    hook = learn.model.decoder.register_forward_pre_hook(stop)
    for f in (learn.validate, learn.get_preds):
        with pytest.raises(Broken): quietly(f)
        assert not torch.is_autocast_enabled('cpu') and not _get_current_function_mode_stack()
    hook.remove()
    quietly(learn.validate)

def test_the_context_of_float16_ends_with_its_batch():
    from sasformer.learner import HalfPrecision
    entered = []
    context = SimpleNamespace(__enter__=lambda: entered.append(1), __exit__=lambda *_: entered.pop())
    cb = HalfPrecision()
    cb.autocast = context
    for leaving in ('after_loss', 'leave', 'after_cancel_batch', 'after_batch'):
        cb.before_batch(); getattr(cb, leaving)(); cb.leave()
        assert not entered

def test_metrics_can_be_dropped_and_added():
    from fastai.metrics import DiceMulti, JaccardCoeffMulti
    learn = learner()
    miou, accuracy = measured(learn)[1:3]
    learn.metrics = learn.metrics[1:]
    assert measured(learn)[1] == accuracy and learn.confusion.total().miou == miou
    assert measured(learn)[1] == accuracy   # each validation counts anew
    learn.metrics = [DiceMulti()]
    learn.metrics = learn.metrics+[JaccardCoeffMulti()]
    assert np.isfinite(measured(learn)).all()

def test_heads_of_tags_keep_their_pooling(tmp_path):
    from sasformer.tag_labels import load_afa, write_tag_labels
    r = recipe('afa_scenes', data='scenes:n_train=4,n_val=2,size=32', size=32, bs=2, epochs=1, precision='fp32',
               method='afa:pooling=average,freeze_norms=false,affinity=0', model='segformer_test_resnet', weights=None,
               last_stride=None)
    quietly(r.run, r.learner(folder=tmp_path/'run', device='cpu'))
    model, options = load_afa(tmp_path/'run')
    assert model.auxiliary['afa'].pooling == 'average'
    assert len(write_tag_labels(model, r.source(), tmp_path/'labels', **options)) == 4   # without affinity, by default

def test_a_methods_own_layers_begin_alike_on_a_model_that_was_given():
    dls, seen = learner('tag', 'afa:affinity=0').dls, []
    for drawn in (1, 2):
        model = create_segmenter('segformer_test_resnet', 6)
        torch.manual_seed(drawn)
        learn = sparse_learner(dls, model, 'afa:affinity=0', precision='fp32')
        seen.append(learn.model.auxiliary['afa'].classify.weight)
    assert torch.equal(*seen)

def test_a_fits_own_weight_decay_spares_norms_too():
    learn = learner()
    quietly(learn.fit_poly, epochs=1, wd=.3)
    assert [h['wd'] for h in learn.opt.hypers] == [.3, 0, .3, 0]
    learn = learner(no_decay=False)
    quietly(learn.fit_poly, epochs=1, wd=.3)
    assert [h['wd'] for h in learn.opt.hypers] == [.3]*4

def test_no_logging_says_nothing():
    learn = learner()
    with learn.no_logging(): assert quietly(learn.fit, 1) == ''
    assert 'epoch 1/1' in quietly(learn.fit, 1)

def share_far_from_nought():
    from sasformer.learner import CPUSyncBatchNorm
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)*.5+1000
    norm, reference = CPUSyncBatchNorm(3), torch.nn.BatchNorm2d(3).double()
    # the mean itself is rounded to float32, 6e-5 of 1000, which the division by .5 doubles
    torch.testing.assert_close(norm(x).double(), reference(x.double()), atol=1e-3, rtol=0)

def test_the_variance_of_a_shared_norm_keeps_its_digits():
    for p in fork_two(connected, share_far_from_nought): p.finish()

def test_validation_leaves_the_random_numbers_alone():
    learn, after = learner(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        quietly(learn.validate)
        after.append(torch.rand(1).item())
    assert after[0] != after[1]

def test_sparse_labels_are_not_taken_for_masks(model):
    from sasformer.inference import evaluate as compare
    src = dataclasses.replace(scenes(n_train=2, n_val=2, size=32), mask_kind='scribble')
    with pytest.raises(ValueError, match="annotation='scribble'"): compare(model, src)

def test_small_validation_images_are_looked_at_as_predictions_are(image):
    learn = learner(val_scale=.5)
    mask = learn.predict(image)[0]
    assert (mask.numpy() == predict_image(learn.model, image)).mean() > .999

@pytest.mark.parametrize('floor', [0., 1.])
def test_the_floor_of_the_complementary_loss_is_a_probability(floor):
    from sasformer.methods import parse_method
    with pytest.raises(ValueError, match='floor'): parse_method(f'simformer:floor={floor}')

def test_the_aspect_of_crops_has_a_limit():
    with pytest.raises(ValueError, match='aspect=2.5: expected from 1'):
        sparse_dataloaders(scenes(n_train=2, n_val=2, size=32), 'scribble', size=32, bs=2, aspect=2.5)

def test_pseudo_labels_remember_how_the_model_looked(tmp_path):
    from sasformer.pseudo import write_pseudo_labels
    src = scenes(n_train=2, n_val=1, size=32)
    model = create_segmenter('segformer_test_resnet', 6, decoder_dim=16).eval()
    annotation = f'dense:novel={src.classes[1]}'
    write_pseudo_labels(model, src, annotation, tmp_path/'out')
    with pytest.raises(ValueError, match="window: None → '32'"):
        write_pseudo_labels(model, src, annotation, tmp_path/'out', window=32)

def test_a_list_of_the_cells_of_one_name(capsys, tmp_path):
    from sasformer import paper
    paper.main(['list', '--only', 'masks-baseline-seed0', '--results', str(tmp_path)])
    assert 'phantoms_switches' in capsys.readouterr().out
    with pytest.raises(SystemExit): paper.main(['list', '--only', 'nothing', '--results', str(tmp_path)])
    assert 'no cell of any table' in capsys.readouterr().err

def test_the_commit_is_this_packages_own(tmp_path, monkeypatch):
    from sasformer import machine
    run = lambda *a: subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *a], cwd=tmp_path, check=True,
                                    capture_output=True)
    (tmp_path/'own.txt').write_text('somebody\'s project')
    (tmp_path/'machine.py').write_text('')
    run('init'); run('add', 'own.txt'); run('commit', '-m', 'theirs')
    monkeypatch.setattr(machine, '__file__', str(tmp_path/'machine.py'))
    monkeypatch.delenv('SASFORMER_COMMIT', raising=False)
    assert machine.environment()['commit'] == ''
    run('add', 'machine.py'); run('commit', '-m', 'ours')
    assert len(machine.environment()['commit']) >= 7

def test_a_run_without_its_state_is_not_trained_over(tmp_path, capsys):
    args = ['--data', 'scenes:n_train=4,n_val=2,size=32', '--size', '32', '--bs', '4', '--decoder_dim', '16',
            '--method', 'baseline', '--precision', 'fp32', '--out', str(tmp_path/'run')]
    train.main([*args, '--epochs', '2'])
    before = (tmp_path/'run/best.safetensors').read_bytes()
    (tmp_path/'run/state.pt').unlink()
    said = refused(train.main, [*args, '--epochs', '2', '--resume', '--lr', '1e-4'], capsys)
    assert 'holds a run of 2 epochs without its state.pt' in said
    (tmp_path/'run/log.csv').write_text(''.join((tmp_path/'run/log.csv').read_text().splitlines(True)[:2]))
    said = refused(train.main, [*args, '--epochs', '1', '--resume'], capsys)   # one epoch, and done
    assert 'holds a run of 1 epochs without its state.pt' in said
    assert (tmp_path/'run/best.safetensors').read_bytes() == before

def test_a_run_that_goes_on_elsewhere_remembers_where_its_data_are(tmp_path, capsys):
    def make(home):
        for d in ('images', 'masks'): (home/d).mkdir(parents=True)
        for i in range(5):
            Image.new('RGB', (32, 32), (40*i, 0, 0)).save(home/f'images/{i}.jpg')
            write_label_map(home/f'masks/{i}.png', np.full((32, 32), i % 2, np.uint8))
        (home/'codes.txt').write_text('a\nb\n')
        return home
    first, second = make(tmp_path/'first'), make(tmp_path/'second')
    class Stopped(Callback):
        def before_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    fields = dict(size=32, bs=4, decoder_dim=16, method='baseline', epochs=2, precision='fp32', annotation='dense',
                  num_workers=0)
    r = recipe('folder', path=str(first), **fields)
    with pytest.raises(KeyboardInterrupt):
        quietly(r.run, r.learner(folder=tmp_path/'run', device='cpu', cbs=[Stopped()]))
    given = [o for k, v in fields.items() for o in (f'--{k}', str(v))]
    train.main(['--data', 'folder', '--path', str(second), '--out', str(tmp_path/'run'), '--resume', *given])
    assert json.loads((tmp_path/'run/settings.json').read_text())['recipe']['path'] == str(second)
    assert f'read from {second}, before from {first}' in capsys.readouterr().out
    images = second/'images'
    said = refused(labels.main, ['simulate', '--data', 'folder', '--path', str(second), '--out', str(images)], capsys)
    assert 'holds images that are read' in said and len(list(images.iterdir())) == 5
    said = refused(evaluate.main, [str(tmp_path/'run'), '--stages'], capsys)
    assert 'holds no heads of AFA' in said

def test_a_teacher_that_is_not_there(tmp_path, capsys):
    args = ['--recipe', 'simformer_scenes', '--self_train', 'true', '--out', str(tmp_path/'run')]
    said = refused(train.main, [*args, '--teacher', str(tmp_path/'typo')], capsys)
    assert f"--teacher {tmp_path/'typo'}: no such folder" in said and not (tmp_path/'typo').exists()

@pytest.mark.parametrize('out', ['', 'deeper'])
def test_labels_of_photographs_do_not_go_among_them(tmp_path, out):
    Image.new('RGB', (32, 32)).save(tmp_path/'a.jpg')
    with pytest.raises(ValueError, match='lies in the folder of the photographs'): set_folder(tmp_path, tmp_path/out)
    assert [f.name for f in tmp_path.iterdir()] == ['a.jpg']

def test_what_sasformer_bench_and_sasformer_paper_write_over(tmp_path, capsys):
    from sasformer import bench, paper
    (tmp_path/'mine.json').write_text('{"a": 1}')
    (tmp_path/'list.json').write_text('[]')
    (tmp_path/'broken.json').write_text('{')
    no_result = 'is no result of sasformer_bench'
    for name, what in (('mine.json', no_result), ('list.json', no_result), ('broken.json', no_result),
                       ('codes.txt', 'ends in .json')):
        assert what in refused(bench.main, ['step', '--out', str(tmp_path/name)], capsys)
    for option in ('--steps', '--batch', '--classes', '--threads', '--size'):
        assert f'argument {option}: 0: expected 1 or more' in refused(bench.main, ['step', option, '0'], capsys)
    assert 'ends in .png' in refused(paper.main, ['sheet', 'scenes', '--out', str(tmp_path/'codes.txt')], capsys)

@pytest.mark.parametrize('args, what', [
    (['--seed', '-1'], 'seed=-1: expected 0 or more'), (['--seed', str(2**63)], 'expected less than 2^63'),
    (['--out', ''], 'argument --out: is empty'), (['--novel', ''], "--novel '': names no class")])
def test_values_that_cannot_be_meant(args, what, capsys): assert what in refused(train.main, args, capsys)

def test_more_classes_than_a_label_map_holds(tmp_path):
    (tmp_path/'images').mkdir()
    (tmp_path/'codes.txt').write_text('\n'.join(map(str, range(300))))
    with pytest.raises(LayoutError, match='300 names of classes; a label map holds at most 254'): folder(tmp_path)
    with pytest.raises(AnnotationError, match='1.5 is none of the values'): folder(tmp_path, ignore=(1.5,))

def test_every_recipe_can_be_meant():
    from sasformer.recipes import RECIPES
    for name in RECIPES: assert recipe(name).methods is not None
