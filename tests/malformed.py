"""Malformed inputs, made from a seed, through the library and the programs: each must be refused in words that name it

    python tests/malformed.py --n 200 --seed 0 --out results/malformed.json

Every kind is a function of a random generator and a folder with a whole data set in it. It spoils something and
returns what to call and the name that the message must hold. Nothing is trained.
"""
import argparse, contextlib, io, json, os, platform, re, shutil, struct, sys, tempfile, warnings, zipfile, zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from sasformer import evaluate, labels, predict
from sasformer.annotations import PointFile, ScribbleXML, read_label_map, write_json, write_label_map
from sasformer.benchmarks import get_source
from sasformer.datasets import folder
from sasformer.downloads import extract

KINDS = {}

def kind(f):
    "Registers a kind of malformed input"
    KINDS[f.__name__] = f
    return f

def whole(home):
    "A small data set that is all there"
    rng = np.random.default_rng(0)
    for d in ('images', 'masks'): (home/d).mkdir(parents=True)
    for i in 'abcdef':
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).save(home/f'images/{i}.png')
        write_label_map(home/f'masks/{i}.png', rng.integers(0, 2, (24, 32), np.uint8))
    (home/'codes.txt').write_text('one\ntwo\n')
    return home

def read_all(home, spec='folder'): return lambda: get_source(spec, home).check(read=True)

def words(*args): return list(map(str, args))

def cut(rng, data): return data[:rng.integers(1, max(2, len(data)*3//4))]

# ---- pictures

def picture(rng, suffix):
    "Bytes of a photograph"
    out = io.BytesIO()
    formats = dict(jpg='JPEG', tif='TIFF')
    Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).save(out, formats.get(suffix, suffix.upper()))
    return out.getvalue()

@kind
def truncated_photograph(rng, home):
    suffix = rng.choice(['png', 'jpg', 'tif', 'bmp', 'webp'])
    (home/'images/a.png').unlink()
    (home/f'images/a.{suffix}').write_bytes(cut(rng, picture(rng, suffix)))
    return read_all(home), f'a.{suffix}'

@kind
def truncated_mask(rng, home):
    f = home/'masks/b.png'
    f.write_bytes(cut(rng, f.read_bytes()))
    return rng.choice([read_all(home), lambda: read_label_map(f)]), 'b.png'

@kind
def mutated_png(rng, home):
    "Some bytes of the pixels are others"
    f = home/rng.choice(['images/c.png', 'masks/c.png'])
    data = bytearray(f.read_bytes())
    start = data.index(b'IDAT')+4
    for _ in range(rng.integers(1, 6)): data[rng.integers(start, len(data)-16)] ^= rng.integers(1, 256)
    f.write_bytes(data)
    return read_all(home), 'c.png'

@kind
def mutated_header(rng, home):
    suffix = rng.choice(['png', 'jpg', 'tif', 'bmp'])
    data = bytearray(picture(rng, suffix))
    for at in rng.integers(0, 4, 3): data[at] ^= rng.integers(1, 256)
    (home/'images/a.png').unlink()
    (home/f'images/a.{suffix}').write_bytes(b'!'+data[1:])
    return read_all(home), f'a.{suffix}'

@kind
def wrong_offsets_in_a_tiff(rng, home):
    data = bytearray(picture(rng, 'tif'))
    data[4:8] = struct.pack('<I', int(rng.choice([0, 3, len(data)-1, len(data)+100, 2**32-1])))
    (home/'images/a.png').unlink()
    (home/'images/a.tif').write_bytes(data)
    return read_all(home), 'a.tif'

@kind
def no_picture(rng, home):
    f = home/rng.choice(['images/d.png', 'masks/d.png'])
    f.write_bytes(rng.choice([b'', b'<!DOCTYPE html><p>404', b'\0'*100, rng.bytes(200), b'version https://git-lfs']))
    return read_all(home), 'd.png'

@kind
def bomb(rng, home):
    "A header that claims more pixels than can be meant"
    f, side = home/rng.choice(['images/e.png', 'masks/e.png']), int(rng.integers(20_000, 2**31-1))
    head = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    chunk = lambda k, d: struct.pack('>I', len(d))+k+d+struct.pack('>I', zlib.crc32(k+d))
    body = chunk(b'IHDR', head)+chunk(b'IDAT', zlib.compress(b'\0'*1000))+chunk(b'IEND', b'')
    f.write_bytes(b'\x89PNG\r\n\x1a\n'+body)
    return read_all(home), 'e.png'

@kind
def stack(rng, home):
    suffix, where = rng.choice(['tif', 'png', 'webp']), rng.choice(['images', 'masks'])
    if where == 'masks': suffix = rng.choice(['tif', 'png'])
    top = 2 if where == 'masks' else 256
    pages = [Image.fromarray(rng.integers(0, top, (24, 32), np.uint8)) for _ in range(rng.integers(2, 5))]
    (home/where/'a.png').unlink()
    pages[0].save(home/where/f'a.{suffix}', save_all=True, append_images=pages[1:])
    return read_all(home), f'a.{suffix}'

@kind
def pixels_without_a_range(rng, home):
    a = rng.choice([rng.normal(size=(24, 32)).astype(np.float32), np.full((24, 32), np.nan, np.float32),
                    rng.integers(-9, 9, (24, 32), np.int32)-100])
    (home/'images/a.png').unlink()
    Image.fromarray(a.astype(np.float32)).save(home/'images/a.tif')
    return read_all(home), 'a.tif'

@kind
def no_file_but(rng, home):
    "A folder or a pipe with the name of a picture"
    f = home/rng.choice(['images', 'masks'])/'x.png'
    os.mkfifo(f) if rng.random() < .5 and hasattr(os, 'mkfifo') else f.mkdir()
    return read_all(home), 'x.png'

# ---- masks

@kind
def mask_of_another_mode(rng, home):
    mode = rng.choice(['RGB', 'RGBA', 'LA', 'CMYK', 'F'])
    suffix = 'tif' if mode in ('CMYK', 'F') else 'png'
    (home/'masks/a.png').unlink()
    Image.fromarray(rng.integers(0, 2, (24, 32), np.uint8)).convert(mode).save(home/f'masks/a.{suffix}')
    return read_all(home), f'a.{suffix}'

@kind
def mask_of_another_format(rng, home):
    suffix = rng.choice(['jpg', 'webp'])
    (home/'masks/a.png').unlink()
    Image.fromarray(rng.integers(0, 2, (24, 32), np.uint8)).save(home/f'masks/a.{suffix}')
    return read_all(home), f'a.{suffix}'

@kind
def mask_of_another_size(rng, home):
    shape = [(32, 24), (24, 33), (1, 1), (12, 16)][rng.integers(4)]
    write_label_map(home/'masks/a.png', np.zeros(shape, np.uint8))
    return read_all(home), 'a.png'

@kind
def mask_of_other_ids(rng, home):
    top = int(rng.choice([2, 200, 253, 1000, 65535]))
    a = rng.integers(0, 2, (24, 32)).astype(np.uint16 if top > 255 else np.uint8)
    a[rng.integers(24), rng.integers(32)] = top
    Image.fromarray(a).save(home/'masks/a.png')
    return read_all(home), 'a.png'

@kind
def colours_that_nobody_named(rng, home):
    for f in (home/'masks').iterdir():
        a = np.zeros((24, 32, 3), np.uint8)
        a[rng.integers(24), rng.integers(32)] = rng.integers(1, 255, 3)
        Image.fromarray(a).save(f)
    return read_all(home, 'folder:colours=000000:one+ff0000:two'), '.png'

@kind
def labels_that_teach_nothing(rng, home):
    "All void, one class only, or 0 and 255 for two classes"
    a = rng.choice([np.full((24, 32), 255), np.zeros((24, 32)), rng.integers(0, 2, (24, 32))*255]).astype(np.uint8)
    for f in (home/'masks').iterdir(): Image.fromarray(a).save(f)
    return lambda: folder(home).judge('dense'), home.name

# ---- layouts and names

@kind
def twins(rng, home):
    "Two images with one name, or one in two splits"
    if rng.random() < .5: shutil.copy(home/'images/a.png', home/'images/a.jpg')
    else:
        for d in ('images', 'masks'):
            (home/d).rename(home/'was')
            for s in ('train', 'val'): shutil.copytree(home/'was', home/d/s)
            shutil.rmtree(home/'was')
    return read_all(home), 'ids must differ'

@kind
def missing_parts(rng, home):
    what = rng.choice(['images', 'masks', 'codes.txt', 'nested'])
    if what == 'nested':
        (home/'images').rename(home/'was')
        shutil.copytree(home/'was', home/'images/more/images')
    else: (home/what).rename(home/'elsewhere')
    return read_all(home), dict(nested='images', masks='nothing labels any|masks: no such folder').get(what, what)

@kind
def empty_folders(rng, home):
    where = home/rng.choice(['images', 'masks'])
    for f in where.iterdir(): f.unlink()
    return read_all(home), where.name

@kind
def option_of_a_data_set(rng, home):
    wrong = rng.choice([
        'values=a', 'values=1', 'values=300:1', 'ignore=x', 'ignore=256', 'val=2', 'val=nan', 'val=-1', 'kind=crayon',
        'colours=red:one', 'colours=ff0000:three', 'value_range=1', 'value_range=5+5', 'value_range=nan+1',
        'max_megapixels=0', 'max_megapixels=many', 'zero_is_unlabelled=perhaps', 'no_such=1', 'images=none',
        'masks=none', 'images=a*b*', 'images=masks/*', 'ending=_mask', 'classes=none.txt', 'seed=x'])
    return read_all(home, f'folder:{wrong}'), re.escape(wrong.split('=')[1])+'|'+wrong.split('=')[0]+'|masks'

# ---- text

@kind
def class_names(rng, home):
    latin = 'größe\ntwo\n'.encode('latin-1')
    text = rng.choice([b'', b'\n\n', b'one\n\ntwo\n', b'one\none\n', latin, b'one\0two\n', b'one\n'])
    (home/'codes.txt').write_bytes(text)
    return read_all(home), 'codes.txt|comes twice|beyond the 1 classes'

@kind
def tags(rng, home):
    rows = rng.choice(['', 'z,one', 'a,three', 'a', 'a,one,two', 'a,', '"a,one', ',one', 'a,'+'x'*200_000, 'a,one\0',
                       'ä,größe'])
    text = rng.choice(['a,one', 'a;one', f'image,tags\n{rows}', f'image,tags\n{rows}', f'image,tags\n{rows}'])
    (home/'tags.csv').write_bytes(f'{text}\n'.encode('latin-1'))
    return read_all(home), 'tags.csv'

@kind
def points(rng, home):
    point = dict(cls=1, x=1, y=2)
    wrong = rng.choice(8)
    if wrong < 5:
        point[rng.choice(['cls', 'x', 'y'])] = [None, 'one', [1], float('nan'), -1e9][wrong]
        data = json.dumps(dict(a=[point])).encode()
    else: data = [json.dumps([point]).encode(), json.dumps(dict(a=point)).encode(), b'{"a": [], "a": []}'][wrong-5]
    (home/'points.json').write_bytes(data)
    return lambda: PointFile(home/'points.json').label_map('a', (24, 32)), 'points.json'

@kind
def json_that_is_none(rng, home):
    latin = '{"ä": []}'.encode('latin-1')
    data = rng.choice([b'', b'{', b'{"a": [{"cls": 1, "x"', b'['*100_000, b'{"a":'*50_000, latin, b'\xff\xfe{',
                       b'\0\0', b'{"a": [{"cls": 1e999, "x": 1, "y": 1}]}', b'NaN'])
    (home/'points.json').write_bytes(data)
    args = ['convert', home/'points.json', '--images', home/'images', '--out', home/'new']
    library = lambda: PointFile(home/'points.json').label_map('a', (24, 32))
    return rng.choice([library, lambda: labels.main(words(*args))]), 'points.json'

@kind
def scribbles(rng, home):
    size = '<size><width>32</width><height>24</height></size>'
    line = '<polygon><tag>{}</tag><point><X>{}</X><Y>{}</Y></point></polygon>'
    text = rng.choice([
        '', '<a>', '<a></b>', f'<a>{size}'+line.format('cat', 1, 'x')+'</a>',
        f'<a>{size}'+line.format('unicorn', 1, 1)+'</a>', f'<a>{size}'+line.format('cat', 99, 1)+'</a>',
        f'<a>{size}'+line.format('cat', 'nan', 1)+'</a>',
        '<a>'+line.format('cat', 1, 1)+'</a>', '<a><size><width>1e9</width><height>1e9</height></size></a>',
        '<a><size><width>-3</width><height>2.5</height></size></a>', '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        '<?xml version="1.0" encoding="klingon"?><a/>', '<a>'*50_000, f'<a>{size}</a>\0', '<a>\ud800</a>'])
    (home/'sup').mkdir()
    (home/'sup/a.xml').write_bytes(text.encode('utf-8', 'surrogatepass'))
    args = ['convert', home/'sup', '--out', home/'new']
    library = lambda: ScribbleXML(home/'sup').label_map('a')
    return rng.choice([library, lambda: labels.main(words(*args))]), 'a.xml'

@kind
def zip_of_scribbles(rng, home):
    f = home/'sup.zip'
    data = rng.choice([b'<a>'+b' '*10_000_000, b'<a/>'])
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.xml', data)
    if len(data) < 1000: f.write_bytes(cut(rng, f.read_bytes()))
    return lambda: ScribbleXML(f).label_map('a'), 'sup.zip'

@kind
def archives(rng, home):
    f = home/'set.zip'
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr(rng.choice(['../out', '/out', 'fine']), bytes(2_000_000))
    if rng.random() < .3: f.write_bytes(cut(rng, f.read_bytes()))
    return lambda: extract(f, home/'unpacked', max_bytes=1e6), 'set.zip'

# ---- programs

@kind
def program_labels(rng, home):
    out = home/'new'
    f = home/'ids.txt'
    f.write_bytes(rng.choice([b'', b'z\n', 'ä\n'.encode('latin-1')]))
    points = home/'points.json'
    points.write_text('{"a": [{"cls": 1, "x": 1, "y": 1}]}')
    (home/'strokes').mkdir()
    Image.new('RGB', (32, 24), (1, 2, 3)).save(home/'strokes/a.png')
    args, name = [
        (('convert', points, '--images', home/'images', '--ids', f, '--out', out), 'ids.txt'),
        (('convert', home/'strokes', '--colours', 'ff0000:1', '--out', out), 'a.png'),
        (('convert', home/'strokes', '--colours', 'reddish:1', '--out', out), 'reddish'),
        (('convert', home/'strokes', '--colours', home/'lost.txt', '--out', out), 'lost.txt'),
        (('convert', home/'strokes', '--colours', '010203:1', '--out', home/'strokes'), 'strokes'),
        (('convert', points, '--images', home/'masks', '--width', 2, '--out', out), "'2'"),
        (('simulate', '--masks', home/'images', '--out', out), 'a.png'),
        (('simulate', '--masks', home/'masks', '--out', home/'masks', '--overwrite'), 'a.png'),
        (('stats', '--data', 'folder:masks=none', '--path', home, '--annotation', 'dense'), 'none'),
        (('stats', '--data', 'folder', '--path', home, '--annotation', 'crayon'), 'crayon'),
        (('tags', '--data', 'folder', '--path', home, '--out', home/'masks/a.png', '--overwrite'), 'a.png'),
        (('tags', '--data', 'folder', '--path', home/'codes.txt', '--out', out), 'codes.txt'),
    ][rng.integers(12)]
    return lambda: labels.main(words(*args)), name

def model_folder(home):
    "A whole run's folder, untrained"
    from sasformer.learner import save_segmenter
    from sasformer.segmenters import create_segmenter
    model = create_segmenter('segformer_test_resnet.r160_in1k', 2, decoder_dim=8)
    save_segmenter(model, home/'run', 'best', ['one', 'two'])
    write_json(home/'run/settings.json', dict(recipe=dict(data='folder', path=str(home), annotation='dense')))
    return home/'run'

RUN = {}

def run_of(home):
    "A copy of a run's folder, made once"
    if not RUN:
        RUN['at'] = tempfile.TemporaryDirectory()
        RUN['run'] = model_folder(Path(RUN['at'].name))
    shutil.copytree(RUN['run'], home/'run')
    write_json(home/'run/settings.json', dict(recipe=dict(data='folder', path=str(home), annotation='dense')))
    return home/'run'

@kind
def program_predict(rng, home):
    run, out = run_of(home), home/'new'
    case, name = rng.integers(6), 'a.png'
    where = home/'images'
    if case == 0: (where/'a.png').write_bytes(cut(rng, (where/'a.png').read_bytes()))
    elif case == 1:
        os.mkfifo(where/'x.jpg') if hasattr(os, 'mkfifo') else (where/'x.jpg').write_bytes(b'')
        name = 'x.jpg'
    elif case == 2: out, name = where, 'images'
    elif case == 3:
        (home/'o/overlays').mkdir(parents=True)
        for f in where.iterdir(): Image.open(f).save(home/f'o/overlays/{f.stem}.jpg')
        where, out, name = home/'o/overlays', home/'o', 'a.jpg'
    elif case == 4: where, name = home/'lost', 'lost'
    else:
        Image.fromarray(np.zeros((24, 32), np.float32)).save(where/'x.tif')
        name = 'x.tif'
    return lambda: predict.main(words(run, where, '--out', out, '--device', 'cpu', '--overwrite')), name

@kind
def program_eval(rng, home):
    run = run_of(home)
    case, extra, name = rng.integers(8), (), 'settings.json'
    wrong = rng.choice([b'', b'{', b'['*100_000, b'[]', b'{"recipe": 3}', b'{"recipe": {"data": 3}}', b'\xff\xfe',
                        b'{"recipe": {"data": "folder", "path": [1]}}'])
    if case < 2:
        name = ('settings.json', 'model.json')[case]
        (run/name).write_bytes(wrong)
    elif case == 2:
        meta = json.loads((run/'model.json').read_text())
        meta[rng.choice(['config', 'classes', 'palette'])] = rng.choice([3, 'x'])
        write_json(run/'model.json', meta)
        name = 'model.json|class'
    elif case < 5:
        name = 'best.safetensors'
        (run/name).write_bytes(cut(rng, (run/name).read_bytes()) if case == 3 else rng.bytes(300))
    elif case == 5: extra, name = ('--out', run/'model.json', '--overwrite'), 'model.json'
    elif case == 6:
        (home/'codes.txt').write_text('one\nthree\n')
        name = "'three'"
    else:
        for f in (home/'masks').iterdir(): f.write_bytes(b'')
        name = r'\w.png'
    return lambda: evaluate.main(words(run, '--device', 'cpu', *extra)), name

# ---- what happens

def outcome(call, name):
    "'refused', or what else happened and why it is not good enough"
    said, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            call()
    except SystemExit as e:
        text = said.getvalue().strip()
        good = e.code == 2 and '\n' not in text and '--traceback shows' not in text
    except (ValueError, OSError) as e: text, good = str(e), True
    except Exception as e: return 'traceback', f'{type(e).__name__}: {e}'[:200]
    else: return 'silent', out.getvalue()[-200:]
    if not good: return 'traceback', text[-300:]
    if not re.search(name, text): return 'unnamed', f'{name!r} is not in: {text[:300]}'
    return 'refused', text[:300]

def case(i, seed, kinds=tuple(KINDS)):
    "(kind, outcome, message) of the input number `i`; kinds take turns"
    rng, name = np.random.default_rng((seed, i)), kinds[i % len(kinds)]
    with tempfile.TemporaryDirectory() as d:
        said = io.StringIO()
        with contextlib.redirect_stdout(said): call, expected = KINDS[name](rng, whole(Path(d)/'set'))
        return name, *outcome(call, expected)

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--n', type=int, default=200)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=None)
    o = p.parse_args(args)
    found = [case(i, o.seed, tuple(KINDS)) for i in range(o.n)]
    for i, (name, what, text) in enumerate(found):
        if what != 'refused': print(f'{i} {name}: {what}: {text}')
    counts = {k: dict(Counter(w for n, w, _ in found if n == k)) for k in KINDS}
    total = dict(Counter(w for _, w, _ in found))
    print(total)
    if o.out:
        import sasformer, torch
        examples = {k: re.sub(r'/\S*/', '…/', next(t for n, w, t in found if n == k)) for k in KINDS}
        versions = dict(python=platform.python_version(), pillow=Image.__version__, numpy=np.__version__,
                        torch=torch.__version__, sasformer=sasformer.__version__)
        write_json(o.out, dict(n=o.n, seed=o.seed, total=total, kinds=counts, examples=examples, versions=versions))
    return total

if __name__ == '__main__': sys.exit(main().keys() != {'refused'})
