"Files as people have them: colours, EXIF, stacks, ranges, layouts, names; each is read right or refused in a line"
import os, struct, unicodedata, zlib
from pathlib import Path

import numpy as np
import pytest, tifffile
from PIL import Image

from sasformer import labels
from sasformer.annotations import (AnnotationError, PointFile, ScribbleXML, allow_megapixels, read_label_map,
                                   write_label_map)
from sasformer.benchmarks import get_source
from sasformer.datasets import LayoutError, folder, open_image
from sasformer.downloads import download_cli

IDS = np.uint8([[0, 1, 2], [255, 1, 0]])
COLOURS = {(0, 0, 0): 0, (255, 0, 0): 1, (0, 255, 0): 2, (255, 255, 255): 255}

def coloured(ids=IDS):
    "The ids as a picture of `COLOURS`"
    table = np.zeros((256, 3), np.uint8)
    for rgb, i in COLOURS.items(): table[i] = rgb
    return Image.fromarray(table[ids])

def dataset(path, ids='abcdef', labels='masks', images='images', size=(6, 4), suffix='.jpg', classes='one\ntwo\n'):
    "A flat folder of images and masks"
    for d in (images, labels): (path/d).mkdir(parents=True, exist_ok=True)
    for n, i in enumerate(ids):
        Image.new('RGB', size, (40*n, 90, 60)).save(path/images/f'{i}{suffix}')
        write_label_map(path/labels/f'{i}.png', np.tile(np.uint8([0, 1]), (size[1], size[0]//2)))
    (path/'codes.txt').write_text(classes)
    return path

# ---- colours

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P'])
def test_masks_of_colours(tmp_path, mode):
    coloured().convert(mode).save(tmp_path/'a.png')
    assert read_label_map(tmp_path/'a.png', colours=COLOURS).tolist() == IDS.tolist()

def test_transparent_is_unlabelled(tmp_path):
    image = np.dstack([np.asarray(coloured(np.uint8([[1, 1]]))), np.uint8([[255, 0]])])
    Image.fromarray(image).save(tmp_path/'a.png')
    assert read_label_map(tmp_path/'a.png', colours=COLOURS).tolist() == [[1, 255]]

def test_a_colour_that_is_not_in_the_map(tmp_path):
    image = np.asarray(coloured()).copy()
    image[1, 2] = 1, 2, 3
    Image.fromarray(image).save(tmp_path/'a.png')
    with pytest.raises(AnnotationError, match=r"a.png: 1 pixels have a colour .* 010203 at x=2, y=1 .*add 010203:255"):
        read_label_map(tmp_path/'a.png', colours=COLOURS)

def test_a_mask_of_colours_without_a_map(tmp_path):
    coloured().save(tmp_path/'a.png')
    with pytest.raises(AnnotationError, match=r'a.png: is a RGB image.*4 colours.*colours=000000:0\+00ff00:1.*convert'):
        read_label_map(tmp_path/'a.png')
    Image.fromarray(np.dstack([IDS]*3)).save(tmp_path/'b.png')
    with pytest.raises(AnnotationError, match='its channels are equal: save it as grey'):
        read_label_map(tmp_path/'b.png')
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path/'c.png')
    with pytest.raises(AnnotationError, match='400 colours: smoothed edges or a photograph'):
        read_label_map(tmp_path/'c.png')

@pytest.mark.parametrize('spec', ['colours=000000:one+FF0000:two', 'colours=000000:0+ff0000:1',
                                  'colours=labelmap.txt', ''])
def test_a_folder_of_colours(tmp_path, spec):
    "On the command line, and CVAT's file beside the masks"
    p = dataset(tmp_path)
    for f in (p/'masks').iterdir():
        Image.fromarray(np.tile(np.uint8([[(0, 0, 0), (255, 0, 0)]]), (4, 3, 1))).save(f)
    if 'colours=0' not in spec:
        (p/'labelmap.txt').write_text('# label:color_rgb:parts:actions\none:0,0,0::\ntwo:255,0,0::\n')
        (p/'codes.txt').unlink()
    src = get_source(f'folder:{spec}', p).check(read=True)
    assert src.classes == ['one', 'two'] and src.mask('a').tolist() == [[0, 1]*3]*4

def test_labelmap_with_a_background_that_is_no_class(tmp_path, capsys):
    p = dataset(tmp_path, classes='two\n')
    for f in (p/'masks').iterdir():
        Image.fromarray(np.tile(np.uint8([[(0, 0, 0), (255, 0, 0)]]), (4, 3, 1))).save(f)
    (p/'masks/labelmap.txt').write_text('background:0,0,0::\ntwo:255,0,0::\n')
    assert folder(p).mask('a').tolist() == [[255, 0]*3]*4
    assert 'background is none of the classes, so its colour means unlabelled' in capsys.readouterr().out

def test_simulated_labels_of_a_folder_of_colours_are_read_again(tmp_path):
    p = dataset(tmp_path)
    for f in (p/'masks').iterdir():
        Image.fromarray(np.tile(np.uint8([[(0, 0, 9), (255, 0, 0)]]), (4, 3, 1))).save(f)
    spec = 'folder:colours=000009:one+ff0000:two'
    args = ['simulate', '--data', spec, '--path', p, '--annotation', 'point', '--split', 'all', '--out', p/'point']
    labels.main(list(map(str, args)))
    src = get_source(spec, p)
    assert src.annotation('a', 'point').tolist() == src.annotation('a', 'sim_point').tolist()

@pytest.mark.parametrize('colours,message', [
    ('ff00:one', "'ff00' is no colour, expected six"),
    ('ff0000:three', "'three' is no class, expected one of one, two"),
    ('ff0000:one+ff0000:two', 'stands for two classes'), ({(1, 2): 'one'}, 'is no colour, expected three'),
    ('lost.txt', 'lost.txt')])
def test_wrong_colours(tmp_path, colours, message):
    with pytest.raises((AnnotationError, OSError), match=message): folder(dataset(tmp_path), colours=colours)
    with pytest.raises(AnnotationError, match='give colours the id 255'):
        folder(tmp_path, colours='ff0000:one', ignore=(0,))

# ---- masks that change on reading

def tiff(path, ids, photometric, bits):
    "An uncompressed TIFF by hand: Pillow writes neither white as 0 nor 2 and 4 bits"
    h, w = ids.shape
    packed = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:].ravel()).tobytes() for row in ids]
    data = b''.join(packed)
    tags = [(256, w), (257, h), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, h),
            (279, len(data))]
    pad = b'\0'*(len(data) % 2)
    ifd = struct.pack('<H', len(tags))+b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in tags)+struct.pack('<I', 0)
    path.write_bytes(struct.pack('<2sHI', b'II', 42, 8+len(data+pad))+data+pad+ifd)
    return path

@pytest.mark.parametrize('bits', [1, 2, 4, 8])
@pytest.mark.parametrize('photometric', [0, 1])
def test_tiff_masks_hold_what_they_hold(tmp_path, bits, photometric):
    ids = np.uint8([[0, 1, 1, 0], [1, 0, 0, 1]]) if bits == 1 else np.uint8([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert read_label_map(tiff(tmp_path/'a.tif', ids, photometric, bits)).tolist() == ids.tolist()

@pytest.mark.parametrize('suffix', ['jpg', 'gif', 'webp'])
def test_masks_of_a_lossy_or_foreign_kind(tmp_path, suffix):
    Image.fromarray(IDS).save(tmp_path/f'a.{suffix}')
    with pytest.raises(AnnotationError, match=rf'{tmp_path}/a.{suffix}: is a \w+ file: .*save masks as PNG'):
        read_label_map(tmp_path/f'a.{suffix}')

# ---- photographs

def test_a_mask_drawn_on_the_unturned_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    p = dataset(tmp_path)
    Image.new('RGB', (6, 4)).save(p/'images/a.jpg', exif=exif)
    with pytest.raises(AnnotationError, match=r'a.png is \(4, 6\).*the other way round: .*and EXIF turns that'):
        folder(p).mask('a')
    (p/'masks').rename(p/'scribble')
    with pytest.raises(AnnotationError, match='and EXIF turns that'): folder(p).annotation('a', 'scribble')

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['jpg', 'tif', 'png', 'webp'])
def test_the_size_from_the_header_is_that_of_the_upright_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    p = dataset(tmp_path, suffix=f'.{suffix}')
    Image.new('RGB', (6, 4)).save(p/f'images/a.{suffix}', exif=exif)
    src = folder(p)
    assert src.shape('a') == src.image('a').size[::-1] == ((6, 4) if orientation > 4 else (4, 6))

@pytest.mark.parametrize('suffix', ['tif', 'gif', 'png', 'webp'])
def test_stacks_are_refused(tmp_path, suffix):
    pages = [Image.fromarray(np.full((4, 6), i, np.uint8)) for i in (0, 90, 200)]
    pages[0].save(tmp_path/f'a.{suffix}', save_all=True, append_images=pages[1:])
    for read in (open_image, read_label_map):
        with pytest.raises((OSError, AnnotationError), match=rf'a.{suffix}: holds 3 pictures'):
            read(tmp_path/f'a.{suffix}')

def test_a_chosen_range(tmp_path):
    "12 bits in 16, and floating point"
    Image.fromarray(np.uint16([[0, 2048, 4095, 9000]])).save(tmp_path/'a.png')
    Image.fromarray(np.float32([[0, .15, .3, -1]])).save(tmp_path/'b.tif')
    grey = lambda f, r: np.asarray(open_image(tmp_path/f, r))[0, :, 0].tolist()
    assert grey('a.png', (0, 4095)) == [0, 128, 255, 255] and grey('a.png', None) == [0, 8, 16, 35]
    assert grey('b.tif', (0, .3)) == [0, 128, 255, 0]
    with pytest.raises(OSError, match=r'b.tif: .*no fixed range \(here -1 to 0.3\): give it'):
        open_image(tmp_path/'b.tif')

def png16(path, a):
    "16-bit colour, which Pillow does not write"
    part = lambda kind, d: struct.pack('>I', len(d))+kind+d+struct.pack('>I', zlib.crc32(kind+d))
    head = struct.pack('>IIBBBBB', a.shape[1], a.shape[0], 16, {2: 4, 3: 2, 4: 6}[a.shape[2]], 0, 0, 0)
    lines = b''.join(b'\0'+row.astype('>u2').tobytes() for row in a)
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+part(b'IHDR', head)+part(b'IDAT', zlib.compress(lines))+part(b'IEND', b''))

@pytest.mark.parametrize('kind', ['png', 'alpha', 'little', 'big', 'zlib'])
def test_colour_of_sixteen_bits(tmp_path, kind):
    "Without a range the upper byte, as Pillow has it; with one both"
    a = np.random.default_rng(0).integers(0, 4096, (5, 7, 3 + (kind == 'alpha'))).astype(np.uint16)
    a[..., 3:], f = 65535, tmp_path/f"a.{'png' if kind in ('png', 'alpha') else 'tif'}"
    if f.suffix == '.png': png16(f, a)
    else: tifffile.imwrite(f, a, byteorder='>' if kind == 'big' else '<', compression=None if kind != 'zlib' else kind)
    assert np.array_equal(open_image(f), a[..., :3] >> 8)
    expected = (a[..., :3]/4095*255).round()
    assert np.array_equal(open_image(f, (0, 4095)), expected)

def test_grey_of_sixteen_bits_with_transparency(tmp_path):
    png16(tmp_path/'a.png', np.full((4, 6, 2), 900, np.uint16))
    with pytest.raises(OSError, match='a.png: .*grey of 16 bits with transparency: save it without'):
        open_image(tmp_path/'a.png', (0, 4095))

def test_the_range_of_a_folder(tmp_path):
    p = dataset(tmp_path, suffix='.png')
    for f in (p/'images').iterdir(): Image.fromarray(np.tile(np.uint16([0, 4000]), (4, 3))).save(f)
    src = get_source('folder:value_range=0+4000', p)
    assert np.asarray(src.image('a'))[0, :2, 0].tolist() == [0, 255] and not src.judge('dense')
    note, = get_source('folder', p).judge('dense')
    assert '16 bits' in note and 'value_range=0+4000' in note
    for f in list((p/'images').iterdir()):   # Pillow writes no colour of 16 bits
        tifffile.imwrite(f.with_suffix('.tif'), np.tile(np.uint16([[[7, 3000, 4000]]]), (4, 6, 1)))
        f.unlink()
    note, = get_source('folder', p).judge('dense')
    assert '16 bits' in note and 'value_range=7+4000' in note
    src = get_source('folder:value_range=0+4000', p)
    assert src.image('a').getpixel((0, 0)) == (0, 191, 255) and not src.judge('dense')
    for wrong in ('value_range=5', 'value_range=5+1'):
        with pytest.raises(AnnotationError, match='expected the values that are black and white'):
            get_source(f'folder:{wrong}', p)

def test_a_fourth_channel_is_not_dropped(tmp_path):
    Image.new('RGBX', (6, 4)).save(tmp_path/'a.tif')
    with pytest.raises(OSError, match='a.tif: has 4 channels, of which only 3 would be used'):
        open_image(tmp_path/'a.tif')

def test_the_limit_of_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)
    p = dataset(tmp_path)
    get_source('folder:max_megapixels=0.00001', p)
    too_many = r'a.\w+: Image size \(24 pixels\) exceeds.*max_megapixels'
    for read in (lambda: folder(p).image('a'), lambda: folder(p).shape('a'), lambda: read_label_map(p/'masks/a.png')):
        with pytest.raises((OSError, AnnotationError), match=too_many): read()
    assert get_source('folder:max_megapixels=1', p).shape('a') == (4, 6)
    for wrong in (0, -1, float('nan')):
        with pytest.raises(AnnotationError, match='expected millions of pixels'): allow_megapixels(wrong)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes on this system')
def test_a_pipe_is_no_image(tmp_path):
    p = dataset(tmp_path)
    os.mkfifo(p/'images/x.jpg')
    for read in (open_image, read_label_map):
        with pytest.raises((OSError, AnnotationError), match='x.jpg: is no file'): read(p/'images/x.jpg')
    with pytest.raises(LayoutError, match='x.jpg: is no file'): folder(p)

# ---- layouts

def test_split_before_kind(tmp_path):
    "train/images and train/masks, and valid/ for val/"
    for s, ids in dict(train='ab', valid='c', test='d').items(): dataset(tmp_path/s, ids)
    (tmp_path/'codes.txt').write_text('one\ntwo\n')
    src = folder(tmp_path).check(read=True)
    assert src.splits == dict(train=['a', 'b'], val=['c'], test=['d'])
    assert src.mask_path('c') == tmp_path/'valid/masks/c.png'

def test_valid_is_val(tmp_path):
    for d in ('images', 'masks'):
        for s, ids in dict(Train='ab', valid='c').items():
            dataset(tmp_path/s, ids)
            (tmp_path/d).mkdir(exist_ok=True)
            (tmp_path/s/d).rename(tmp_path/d/s)
    (tmp_path/'codes.txt').write_text('one\ntwo\n')
    assert folder(tmp_path).check().splits == dict(train=['a', 'b'], val=['c'])
    (tmp_path/'images/val').mkdir()
    with pytest.raises(LayoutError, match="would both be the split 'val'"): folder(tmp_path)

@pytest.mark.parametrize('image,mask,spec', [
    ('image_{}.png', 'mask_{}.png', 'images=all/image_*,masks=all/mask_*'),
    ('{}.png', '{}_mask.png', 'images=all/*,masks=all/*_mask'),
    ('{}.jpg', '{}.png', 'images=all/*.jpg,masks=all/*.png')])
def test_images_and_masks_in_one_folder(tmp_path, image, mask, spec):
    (tmp_path/'all').mkdir()
    dataset(tmp_path)
    for i in 'abcdef':
        Image.open(tmp_path/f'images/{i}.jpg').save(tmp_path/'all'/image.format(i))
        (tmp_path/f'masks/{i}.png').rename(tmp_path/'all'/mask.format(i))
    src = get_source(f'folder:{spec}', tmp_path).check(read=True)
    assert sorted(src.images) == list('abcdef') == sorted(src.masks) and src.mask_path('a').name == mask.format('a')
    with pytest.raises(LayoutError, match='tell them apart'): folder(tmp_path, images='all', masks='all')

def test_what_is_not_read_is_said(tmp_path, capsys):
    p = dataset(tmp_path)
    (p/'images/z.gif').write_bytes(b'GIF')
    (p/'scribbles').mkdir()
    (p/'images/f.jpg').unlink()
    folder(p)
    said = capsys.readouterr().out
    words = ('no images by their endings, left out: 1 files, such as', 'z.gif', 'f.png',
             'label files in masks without an image, left out: 1', 'scribbles is not read: is scribble/ meant?')
    assert all(w in said for w in words)

def test_names_that_macos_takes_apart(tmp_path):
    nfc, nfd = (unicodedata.normalize(f, 'é') for f in ('NFC', 'NFD'))
    p = dataset(tmp_path, ['a', 'b', 'c', nfd])
    (p/f'masks/{nfd}.png').rename(p/f'masks/{nfc}.png')
    (p/'tags.csv').write_text('image,tags\n'+''.join(f'{i},one\n' for i in ['a', 'b', 'c', nfd+'.jpg']))
    assert nfc in folder(p).check(read=True).tag_table

@pytest.mark.parametrize('coding', ['utf-8-sig', 'utf-16'])
def test_text_with_a_byte_order_mark(tmp_path, coding):
    p = dataset(tmp_path)
    (p/'codes.txt').write_text('böden\ntwo\n', coding)
    (p/'points.json').write_text('{"ä": [{"cls": 1, "x": 0, "y": 0}]}', coding)
    (p/'tags.csv').write_text('image,tags\n'+''.join(f'{i},böden\n' for i in 'abcdef'), coding)
    assert folder(p).tags('a') == (0,) and PointFile(p/'points.json').ids == ['ä']
    points = lambda p: PointFile(p/'points.json')
    for name, read in (('codes.txt', folder), ('tags.csv', folder), ('points.json', points)):
        kept = (p/name).read_bytes()
        (p/name).write_bytes('böden'.encode('latin-1'))
        with pytest.raises((AnnotationError, LayoutError), match=f'{name}: is not UTF-8'): read(p)
        (p/name).write_bytes(kept)

def test_endings_in_capitals(tmp_path):
    xml = '<a><size><width>6</width><height>4</height></size></a>'
    (tmp_path/'a.XML').write_text(xml)
    assert ScribbleXML(tmp_path).ids == ['a'] and ScribbleXML(tmp_path).label_map('a').shape == (4, 6)
    with pytest.raises(AnnotationError, match='and EXIF turns that'): ScribbleXML(tmp_path).label_map('a', shape=(6, 4))

# ---- per image the best label there is

def test_the_best_label_of_each_image(tmp_path, capsys):
    "Masks, scribbles, points, nothing; validation where there are masks"
    p = dataset(tmp_path, 'abcdefgh')
    for i in 'cdefgh': (p/f'masks/{i}.png').unlink()
    for kind, ids in dict(scribble='cde', point='ef').items():
        (p/kind).mkdir()
        for i in ids: write_label_map(p/kind/f'{i}.png', np.where(np.eye(4, 6), len(kind) % 2, 255))
    src = folder(p).check(read=True)
    assert '2 of 8 images have no labels and are left out' in capsys.readouterr().out
    val, = src.splits['val']
    assert val in 'ab' and sorted(src.splits['train']+[val]) == list('abcdef')
    kinds = {i: src.best_kind(i) for i in src.splits['train']}
    assert kinds == {**{i: 'dense' for i in 'ab' if i != val}, **dict.fromkeys('cde', 'scribble'), 'f': 'point'}
    src.precompute('best')
    assert (src.annotation('e', 'best') == src.annotation('e', 'scribble')).all()
    assert (src.annotation('f', 'best') == src.annotation('f', 'point')).all()
    with pytest.raises(LayoutError, match="no scribble labels for 2 of 5 train images.*--annotation best"):
        src.precompute('scribble')
    assert any('1 dense, 3 scribble, 1 point' in note for note in src.judge('best'))

def test_sparse_training_labels_and_dense_validation_masks(tmp_path):
    for folders, s, ids, rest in (('images', 'scribble'), 'train', 'ab', 255), (('images', 'masks'), 'val', 'cd', 0):
        for d in folders: (tmp_path/d/s).mkdir(parents=True)
        for i in ids:
            Image.new('RGB', (6, 4)).save(tmp_path/f'images/{s}/{i}.jpg')
            write_label_map(tmp_path/folders[1]/s/f'{i}.png', np.where(np.eye(4, 6), 1, rest))
    (tmp_path/'codes.txt').write_text('one\ntwo\n')
    src = folder(tmp_path).check(read=True)
    assert src.splits == dict(train=['a', 'b'], val=['c', 'd'])
    assert src.mask_kind == 'dense' and list(src.masks) == ['c', 'd']

# ---- programs

def test_strokes_in_colours_are_converted(tmp_path):
    "As painting programs write them: transparent or white where nothing is labelled"
    (tmp_path/'strokes').mkdir()
    coloured().save(tmp_path/'strokes/a.png')
    pixels = np.dstack([np.asarray(coloured()), np.where(IDS == 255, 0, 255)]).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path/'strokes/b.png')
    (tmp_path/'codes.txt').write_text('ground\ncar\ntree\n')
    spec = '000000:0+ff0000:car+00ff00:tree+ffffff:255'
    args = ['convert', tmp_path/'strokes', '--colours', spec, '--classes', tmp_path/'codes.txt']
    labels.main([*map(str, args), '--out', str(tmp_path/'scribble')])
    assert all(read_label_map(tmp_path/f'scribble/{i}.png').tolist() == IDS.tolist() for i in 'ab')

def test_an_id_with_a_space(tmp_path):
    p = dataset(tmp_path, ['a b', 'c'])
    (p/'points.json').write_text('{"a b": [{"cls": 1, "x": 1, "y": 1}], "c": []}')
    (p/'ids.txt').write_text('a b\r\n')
    args = ['convert', p/'points.json', '--images', p/'images', '--ids', p/'ids.txt', '--out', p/'point']
    labels.main(list(map(str, args)))
    assert [f.name for f in (p/'point').iterdir()] == ['a b.png']

def test_a_census_is_a_part_of_looking(tmp_path, capsys):
    p = dataset(tmp_path)
    for f in (p/'masks').iterdir(): Image.fromarray(np.tile(np.uint8([0, 255]), (4, 3))).save(f)
    labels.main(['stats', '--data', 'folder', '--path', str(p), '--annotation', 'dense'])
    assert "'one' is the only class" in capsys.readouterr().out
    download_cli('check', 'folder:values=255:1', path=str(p), read=True)
    assert 'training labels: 5 dense' in capsys.readouterr().out

def test_what_predictions_are_compared_with(tmp_path):
    "With masks where there are some, else with the labels that the run was given; the report says which"
    from sasformer.evaluate import labels_of
    p = dataset(tmp_path/'masked')
    dataset(tmp_path/'sparse', labels='scribble')
    (p/'settings.json').write_text('{"recipe": {"data": "folder", "annotation": "scribble:width=3"}}')
    assert labels_of(p, folder(p), 'val') == 'dense'
    assert labels_of(p, folder(tmp_path/'sparse'), 'val') == 'scribble:width=3'

def test_evaluation_knows_the_options_of_the_run(tmp_path):
    from sasformer.evaluate import open_data
    p = dataset(tmp_path)
    settings = '{"recipe": {"data": "folder:value_range=0+4095,val=0.5", "path": "%s"}}'
    (p/'settings.json').write_text(settings % p)
    for data in (None, 'folder'): assert len(open_data(p, data).splits['val']) == 3   # with the options of the run
    src = open_data(p, 'folder:value_range=0+99')
    assert src.value_range == (0, 99) and len(src.splits['val']) == 1
