"What tools have written, read by us; what we write, read by others; what is wrong in them, in one line"
import json
import numpy as np, pytest
from PIL import Image
from sasformer import labels
from sasformer.annotations import UNLABELLED, read_label_map
from sasformer.label_tools import CocoFile, LabelStudioFile, box_mask, brush_mask, run_lengths, write_coco, write_cvat

CLASSES = ['sky', 'road', 'cat']
# of the mask below, by `encode_rle` of label_studio_converter 0.0.59
BRUSH = [0, 0, 2, 208, 57, 27, 254, 31, 0, 183, 255, 153, 192, 48, 159, 254, 99, 0, 194, 127, 249, 140, 3, 9, 255, 227,
         112, 8, 255, 241, 88, 5, 191, 252, 150, 1, 111, 254, 48, 12, 207, 254]


def mask():
    y, x = np.mgrid[:6, :30]
    m = (x-9)**2+(y-2)**2 <= 7
    m[5], m[5, 3], m[3, 26] = True, False, True
    return m


def random_labels(shape, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 1, 2, UNLABELLED], (shape[0]//4+1, shape[1]//4+1)).astype(np.uint8)
    out = coarse.repeat(4, 0).repeat(4, 1)[:shape[0], :shape[1]].copy()
    out[rng.random(shape) < .05] = 2
    return out


def test_a_brush_of_label_studio(): assert (brush_mask(BRUSH, (6, 30)) == mask()).all()


@pytest.mark.parametrize('share', (0, .02, .5, 1))
def test_brushes_that_label_studios_converter_packs(share):
    brush = pytest.importorskip('label_studio_converter.brush', reason="label_studio_converter is not here")
    drawn = np.random.default_rng(0).random((50, 70)) < share
    drawn[10:40, 20:60] = share > 0   # runs of more than 256
    packed = brush.encode_rle(np.repeat(drawn[..., None]*np.uint8(255), 4, -1).ravel())
    assert (brush_mask(packed, drawn.shape) == drawn).all()


def test_pycocotools_reads_what_we_write(tmp_path):
    coco = pytest.importorskip('pycocotools.coco', reason="pycocotools is not here")
    maps = {f'{k}.jpg': random_labels((31+k, 50), k) for k in range(3)}
    write_coco(tmp_path/'coco.json', maps.items(), CLASSES)
    theirs = coco.COCO(tmp_path/'coco.json')
    for image in theirs.loadImgs(theirs.getImgIds()):
        found = np.full((image['height'], image['width']), UNLABELLED, np.uint8)
        for a in theirs.loadAnns(theirs.getAnnIds(image['id'])):
            area = theirs.annToMask(a) == 1
            name = theirs.loadCats(a['category_id'])[0]['name']
            assert area.sum() == a['area']
            found[area] = CLASSES.index(name)
        assert (found == maps[image['file_name']]).all()


def test_we_read_what_pycocotools_packs(tmp_path):
    masks = pytest.importorskip('pycocotools.mask', reason="pycocotools is not here")
    labelled = random_labels((40, 60))
    write_coco(tmp_path/'coco.json', [('a.jpg', labelled)], CLASSES)
    data = json.loads((tmp_path/'coco.json').read_text())
    for a in data['annotations']:
        a['segmentation'] = masks.frPyObjects(a['segmentation'], 40, 60)
        a['segmentation']['counts'] = a['segmentation']['counts'].decode()
    (tmp_path/'coco.json').write_text(json.dumps(data))
    assert (CocoFile(tmp_path/'coco.json').label_map('a') == labelled).all()


# The program

def result(kind, label, **value):
    return dict(type=kind, original_width=80, original_height=60, image_rotation=0, value={**value, kind: [label]})


def task(*results, image='cat.png', **more):
    return dict(id=7, data=dict(image=f'/data/upload/1/0a1b2c3d-{image}'), annotations=[dict(result=results, **more)])


def cvat(shape, name='cat.png', size='width="80" height="60"'):
    return ('<annotations><version>1.1</version><meta><task><labels><label><name>sky</name></label></labels></task>'
            f'</meta><image id="0" name="{name}" {size}>{shape}</image></annotations>')


BOX = result('rectanglelabels', 'sky', x=10, y=10, width=50, height=50)
XML_BOX = '<box label="sky" xtl="8" ytl="6" xbr="48" ybr="36"/>'


@pytest.fixture
def home(tmp_path):
    (tmp_path/'images').mkdir()
    Image.new('RGB', (80, 60)).save(tmp_path/'images/cat.png')
    (tmp_path/'codes.txt').write_text('\n'.join(CLASSES))
    return tmp_path


def convert(home, content, *options):
    "The program on a file"
    file = home/('labels.xml' if isinstance(content, str) else 'labels.json')
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    labels.main(['convert', str(file), '--images', str(home/'images'), '--classes', str(home/'codes.txt'),
                 '--out', str(home/'out'), *options])
    return read_label_map(home/'out/cat.png')


@pytest.mark.parametrize('content', ([task(BOX)], cvat(XML_BOX)))
def test_converted_by_the_program(home, content):
    expected = np.full((60, 80), UNLABELLED, np.uint8)
    expected[6:36, 8:48] = 0
    assert (convert(home, content) == expected).all()


WRONG = [
    ([task(result('rectanglelabels', 'dog', x=1, y=1, width=5, height=5))], "task 7: result 1: class 'dog' is none of"),
    ([task(dict(BOX, original_width=90))], 'was drawn on an image of (60, 90) (H, W), the image is (60, 80)'),
    ([task(result('ellipselabels', 'sky', x=1, y=1))], "is 'ellipselabels', expected brushlabels"),
    ([task(dict(type='choices', value={}))], "is 'choices'"),
    ([task(BOX, image='dog.png')], 'no image for 1 of 1 labelled ids, such as dog'),
    ([task(result('brushlabels', 'sky', rle=BRUSH))], 'rle of the 80×60 pixels'),
    ([task(dict(BOX, original_width=10**6, original_height=10**6))], 'over the limit'),
    ([task(result('keypointlabels', 'sky', x=120, y=1))], 'is outside of the image'),
    ([task(result('polygonlabels', 'sky', points=[[1, 1], [2, 2]]))], 'at least 3 corners'),
    ([task(BOX, was_cancelled=True)], 'no image in it has a label'),
    ([dict(task(BOX), annotations=[dict(result=[BOX])]*2)], 'has 2 annotations'),
    ([dict(data={})], 'task 1: expected one image'), ([7], 'expected'),
    (cvat('<box label="dog" xtl="8" ytl="6" xbr="48" ybr="36"/>'), "class 'dog' is none of"),
    (cvat(XML_BOX, size='width="80" height="50"'), 'was drawn on an image of (50, 80) (H, W), the image is (60, 80)'),
    (cvat('<cuboid label="sky"/>'), "is 'cuboid', expected polyline"), (cvat('<tag label="sky"/>'), "is 'tag'"),
    (cvat(XML_BOX, name='dog.png'), 'no image for 1 of 1 labelled ids, such as dog'),
    (cvat('<polyline label="sky" points="1,1;90,3"/>'), 'x=90, y=3 is outside'),
    (cvat('<box label="sky" xtl="8"/>'), 'ytl of <box> is None'), (cvat(XML_BOX)[:-5], 'not a plain XML'),
    (cvat('<mask label="sky" rle="3" left="78" top="0" width="3" height="1"/>'), 'fill its box'),
    (cvat('<polyline label="sky" points=""/>'), 'expected positions'),
]

@pytest.mark.parametrize('content, message', WRONG)
def test_what_is_wrong_is_said_in_one_line_that_names_the_file(home, content, message, capsys):
    with pytest.raises(SystemExit): convert(home, content)
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1 and str(home) in said
    assert not list(home.glob('out/*'))
