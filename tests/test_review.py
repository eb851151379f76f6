"Faults that readers of the source found: each with the input that showed it"
import json, subprocess, sys
import numpy as np, pytest, torch
from PIL import Image
from sasformer import downloads, labels
from sasformer.annotate import LabelSet, Training, set_classes, set_folder
from sasformer.annotations import AnnotationError, draw_lines, image_seed, read_label_map, write_label_map
from sasformer.datasets import LayoutError, Source, folder, open_bands, write_tags
from sasformer.inference import predict_image
from sasformer.label_tools import box_mask, polygon_mask, run_mask
from sasformer.segmenters import create_segmenter

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

@pytest.mark.parametrize('end', ['pipe', 'help'])
def test_sasformer_data_is_a_program_like_the_others(end):
    args = dict(pipe='list | head -1', help='check nothing --path nowhere')[end]
    r = subprocess.run(f'{sys.executable} -u -m sasformer.downloads {args}', shell=True, capture_output=True, text=True)
    assert 'Traceback' not in r.stderr and len(r.stderr.splitlines()) <= 1, r.stderr

@pytest.mark.parametrize('length,whole', [('10', 15), (None, None)])
def test_a_server_that_does_not_say_how_long_the_whole_is(monkeypatch, length, whole):
    class Answer:
        status, headers = 206, {'Content-Range': 'bytes 5-14/*'} | ({'Content-Length': length} if length else {})
    monkeypatch.setattr(downloads.urllib.request, 'urlopen', lambda *a, **kw: Answer())
    assert downloads._request('http://x', 5, 'tag', 1)[1:] == (5, whole)
