"The programs, end to end: train, evaluate, predict; labels simulated, converted and counted; faults in one line"
import argparse, csv, json, os, shutil, subprocess, sys, zipfile
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from conftest import write_folder
from sasformer import evaluate, labels, predict, train
from sasformer.annotations import SCRIBBLE_TAGS, read_label_map, simulate, write_label_map
from sasformer.benchmarks import get_source
from sasformer.datasets import folder, open_image, scenes

PROGRAMS = dict(sasformer_train='train', sasformer_eval='evaluate', sasformer_predict='predict',
                sasformer_labels='labels')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A data set in the layout of `folder`: 8 + 4 small scenes"
    path, src = tmp_path_factory.mktemp('data')/'set', scenes(n_train=8, n_val=4, size=64)
    write_folder(src, path)
    return path


@pytest.fixture(scope='module')
def run(home):
    "The folder of a run of one epoch"
    out = home.parent/'run'
    train.main(f'--data folder --path {home} --epochs 1 --size 64 --bs 4 --device cpu --out {out}'.split())
    return out


@pytest.fixture
def photos(tmp_path):
    "Images as they come: grey, transparent, turned, with a palette, with 16 bits, tiny"
    path, rng = tmp_path/'photos', np.random.default_rng(0)
    path.mkdir()
    rgb = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
    rgb.convert('L').save(path/'grey.png')
    rgb.convert('RGBA').save(path/'rgba.png')
    rgb.quantize(16).save(path/'palette.png')
    Image.fromarray(rng.integers(0, 65535, (40, 60), np.uint16)).save(path/'bits16.png')
    rgb.crop((0, 0, 5, 3)).save(path/'tiny.bmp')
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(path/'turned.jpg', exif=exif)
    return path


def files(path): return sorted((str(p), p.stat().st_mtime_ns) for p in path.rglob('*'))


def fails(main, args, capsys, *words):
    "The program ends with status 2 and one line that holds the words"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.count('\n') == 1 and err.startswith('sasformer_') and ': error: ' in err, err + out
    # at most the line that says on what it computes
    assert not out or out.count('\n') == 1 and ' on cpu, ' in out, out
    for w in words: assert str(w) in err, err


def parsers():
    "Every parser of the programs, sub-commands included"
    ps = [train.train_parser(), evaluate.eval_parser(), predict.predict_parser(), labels.labels_parser()]
    return ps + list(next(a for a in ps[-1]._actions if isinstance(a, argparse._SubParsersAction)).choices.values())


@pytest.mark.parametrize('p', parsers(), ids=lambda p: p.prog)
def test_every_argument_is_documented(p):
    text = p.format_help()
    for a in p._actions:
        assert a.help and a.help.strip() and a.help is not argparse.SUPPRESS, f'{p.prog}: {a.dest} has no help'
        for o in a.option_strings: assert o in text


def test_every_argument_of_sasformer_data_is_documented(capsys, monkeypatch):
    from fastcore.script import anno_parser
    from sasformer.downloads import download_cli
    for a in anno_parser(getattr(download_cli, '__wrapped__', download_cli), 'sasformer_data')._actions:
        if a.dest not in ('pdb', 'xtra'):
            assert a.help and a.help.split('(default')[0].strip(), f'sasformer_data: {a.dest} has no help'


@pytest.mark.parametrize('module', ['train', 'labels'])
def test_as_a_program(module, tmp_path):
    "What the other tests call in process also starts from a shell, and ends with status 2 on a wrong value"
    args = dict(train=['--bs', '0', '--out', 'x'], labels=['simulate', '--masks', 'nowhere', '--out', 'x'])[module]
    env = dict(os.environ, PYTHONPATH=str(Path(train.__file__).parents[1]))
    r = subprocess.run([sys.executable, '-m', f'sasformer.{module}', *args], capture_output=True, text=True,
                       cwd=tmp_path, env=env)
    assert r.returncode == 2 and 'Traceback' not in r.stderr, r.stderr
    assert f'sasformer_{module}: error: ' in r.stderr.splitlines()[-1], r.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('module,wrong', [
    ('train', ['--epochs', '0']), ('train', ['--method', 'sasformer:alpha=-1']), ('train', ['--method', 'sasform']),
    ('train', ['--annotation', 'dots']), ('evaluate', []), ('evaluate', ['run', '--scales', '0']),
    ('predict', []), ('predict', ['run', 'none', '--out', 'x']), ('labels', ['stats']),
    ('paper', ['run', 'table9']), ('bench', ['step', '--variants', 'magic']), ('demo', ['--epochs', 'many'])])
def test_help_and_wrong_arguments_need_no_torch(module, wrong):
    "Nor anything else that takes seconds to load"
    code = f"""import sys
from importlib import import_module
main = import_module('sasformer.{module}').main
for args in (['--help'], {wrong!r}):
    try: main(args)
    except SystemExit as e: print(e.code)
print([m for m in ('torch', 'fastai', 'timm', 'numba', 'pandas', 'matplotlib') if m in sys.modules])"""
    env = dict(os.environ, PYTHONPATH=str(Path(train.__file__).parents[1]))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert lines[-3:-2] == ['0'] and lines[-2:] == ['2', '[]'], done.stdout[-300:]+done.stderr


def test_entry_points_exist():
    import configparser, importlib
    c = configparser.ConfigParser()
    c.read(Path(train.__file__).parents[1]/'settings.ini')
    for line in c['DEFAULT']['console_scripts'].split():
        module, name = line.partition('=')[2].split(':')
        assert callable(getattr(importlib.import_module(module), name)), line


# Evaluate

def test_eval(run, home, tmp_path, capsys):
    "The numbers are those of the library, by default on the data of the run"
    from sasformer.inference import evaluate as by_hand
    from sasformer.learner import load_segmenter
    out = tmp_path/'new'/'eval.json'
    evaluate.main([str(run), '--out', str(out)])
    text = capsys.readouterr().out
    r = json.loads(out.read_text(), parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))
    cm = by_hand(load_segmenter(run), folder(home), progress=False)
    assert r['miou'] == cm.miou and r['pixel_accuracy'] == cm.pixel_accuracy and r['mean_accuracy'] == cm.mean_accuracy
    assert (r['data'], r['split'], r['images'], r['scales']) == ('folder', 'val', 4, [1.])
    assert list(r['iou']) == folder(home).classes and f'mIoU {100*cm.miou:.2f}' in text
    for c in folder(home).classes: assert c in text


def test_eval_dice_of_groups(run, home, tmp_path, capsys):
    "Counted by group they are the same pixels; one group is the data set"
    def r(*args):
        evaluate.main([str(run), '--out', str(tmp_path/f'{len(args[-1])}.json'), *args])
        return json.loads((tmp_path/f'{len(args[-1])}.json').read_text())
    whole, each = r('--dice_of', '^'), r('--dice_of', '.*')
    assert whole['pixels'] == each['pixels'] and (whole['dice']['groups'], each['dice']['groups']) == (1, 4)
    for c, iou in whole['iou'].items():
        if iou is not None: assert abs(whole['dice']['mean'][c]-2*iou/(1+iou)) < 1e-9
    assert 'Dice, mean of 4 groups: ' in capsys.readouterr().out


def test_images_are_looked_at_as_in_the_training(run, photos, tmp_path, capsys):
    "A run that was validated at half the size is evaluated and predicts so, unless it is told otherwise"
    half = tmp_path/'half'
    shutil.copytree(run, half)
    about = json.loads((half/'model.json').read_text())
    assert about['val_scale'] == 1
    (half/'model.json').write_text(json.dumps(dict(about, val_scale=.5)))
    def r(folder, *args):
        out = tmp_path/f"{folder.name}{len(args)}.json"
        evaluate.main([str(folder), '--out', str(out), *args])
        return json.loads(out.read_text())
    ours, said = r(half), capsys.readouterr().out
    assert ours['scales'] == [.5] and "at 0.5 of the images' size" in said
    assert ours['accuracy'] == r(run, '--scales', '0.5')['accuracy'] != r(half, '--scales', '1')['accuracy']
    capsys.readouterr()
    for name, args in dict(unasked=[half], asked=[run, '--scales', '0.5']).items():
        predict.main([str(args[0]), str(photos), '--out', str(tmp_path/name), '--no-overlay', *args[1:]])
        assert "at 0.5 of the images' size" in capsys.readouterr().out
    masks = [sorted((tmp_path/name).glob('*.png')) for name in ('unasked', 'asked')]
    assert masks[0] and all(a.read_bytes() == b.read_bytes() for a, b in zip(*masks))


def test_eval_options_reach_the_model(run, home, tmp_path):
    def r(*args):
        out = tmp_path/f"{'_'.join(args)}.json"
        evaluate.main([str(run/'best.safetensors'), '--data', 'folder', '--path', str(home), '--out', str(out), *args])
        return json.loads(out.read_text())
    plain = r()
    for args in (['--scales', '0.5,1.5'], ['--flip'], ['--window', '32'], ['--split', 'train'],
                 ['--precision', 'bf16']):
        assert r(*args)['accuracy'] != plain['accuracy'], args
    assert len(r('--scales', 'paper')['scales']) == 7


def test_eval_faults(run, home, tmp_path, capsys):
    before, new = files(home.parent), tmp_path/'new.json'
    def bad(args, *words): fails(evaluate.main, [*args, '--out', new], capsys, *words)
    bad([run, '--scales', '1,0'], '--scales', '1,0')
    bad([run, '--window', '7'], '--window', '7')
    bad([run, '--precision', 'fp8'], '--precision')
    bad([run, '--device', 'gpu'], '--device', 'gpu')
    bad([run, '--data', 'imagenet'], '--data', 'imagenet')
    bad([run, '--data', 'folder', '--path', tmp_path/'none'], tmp_path/'none')
    bad([run, '--path', tmp_path/'none'], tmp_path/'none')
    bad([run, '--split', 'test'], '--split', 'test')
    bad([run, '--dice_of', '('], '--dice_of', 'regular expression')
    bad([run, '--dice_of', 'heart'], '--dice_of heart', 'nothing in the id')
    bad([run, '--flop'], '--flop')
    bad([tmp_path], 'settings.json', '--data')
    bad([tmp_path, '--data', 'scenes'], 'best.safetensors')
    bad([run, '--data', 'camvid'], 'camvid')
    fails(evaluate.main, [], capsys, 'model')
    new.write_text('mine')
    bad([run], new, '--overwrite')
    assert new.read_text() == 'mine' and files(home.parent) == before


def test_eval_of_another_models_files(run, home, tmp_path, capsys):
    def bad(*words): fails(evaluate.main, [tmp_path, '--data', 'folder', '--path', home], capsys, *words)
    (tmp_path/'best.safetensors').write_bytes((run/'best.safetensors').read_bytes())
    meta = json.loads((run/'model.json').read_text())
    for wrong, word in (('{}', 'model.json'), ('[', 'model.json')):
        (tmp_path/'model.json').write_text(wrong)
        bad(word)
    (tmp_path/'model.json').write_text(json.dumps(dict(meta, classes=['sky', *meta['classes'][1:]])))
    bad("class 0 is 'sky' in the model", "'background'")
    (tmp_path/'model.json').write_text(json.dumps(dict(meta, classes=[])))   # saved without names: numbers are compared
    evaluate.main([str(tmp_path), '--data', 'folder', '--path', str(home)])
    fails(evaluate.main, [tmp_path, '--data', 'coco2014', '--path', home], capsys, home)
    (tmp_path/'settings.json').write_text('[]')
    fails(evaluate.main, [tmp_path], capsys, 'settings.json')


# Predict

def test_predict(run, photos, tmp_path, capsys):
    out = tmp_path/'masks'
    predict.main([str(run), str(photos), '--out', str(out)])
    assert '6 masks written, 0 files skipped' in capsys.readouterr().out
    for f in photos.iterdir():
        mask = Image.open(out/f'{f.stem}.png')
        assert mask.mode == 'P' and mask.size == open_image(f).size
        assert read_label_map(out/f'{f.stem}.png').max() < 6 and (out/'overlays'/f'{f.stem}.jpg').exists()
    assert Image.open(out/'turned.png').size == (40, 60) and (out/'overlays'/'legend.png').exists()
    assert Image.open(out/'grey.png').getpalette()[3:6] == folder_palette(run)[1]


def folder_palette(run): return json.loads((run/'model.json').read_text())['palette']


def test_predict_one_image_without_overlay(run, photos, tmp_path):
    out = tmp_path/'masks'
    predict.main([str(run/'last.safetensors'), str(photos/'grey.png'), '--out', str(out), '--no-overlay', '--flip',
                  '--scales', '0.5,1', '--window', '32', '--precision', 'bf16'])
    assert [p.name for p in out.iterdir()] == ['grey.png']


def test_predict_faults(run, photos, tmp_path, capsys):
    new = tmp_path/'new'
    def bad(args, *words): fails(predict.main, [*args, '--out', new], capsys, *words)
    bad([run, tmp_path/'none'], tmp_path/'none')
    bad([tmp_path, photos], 'best.safetensors')
    bad([run, photos, '--alpha', '1.5'], '--alpha', '1.5')
    bad([run, photos, '--scales', 'big'], '--scales', 'big')
    bad([run, photos, '--window', '-3'], '--window', '-3')
    bad([run, photos, '--on_error', 'cry'], '--on_error')
    bad([run, photos, '--device', 'cuda:77'], '--device', 'cuda:77')
    fails(predict.main, [run, photos], capsys, '--out')
    fails(predict.main, [run, photos, '--out', photos], capsys, photos)
    (photos/'broken.jpg').write_bytes(b'\xff\xd8')
    bad([run, photos], 'broken.jpg')
    assert not new.exists()
    predict.main([str(run), str(photos), '--out', str(new), '--on_error', 'skip', '--no-overlay'])
    assert 'broken.jpg' in capsys.readouterr().out
    before = files(new)
    bad([run, photos, '--on_error', 'skip'], 'there already', '--overwrite')
    assert files(new) == before
    predict.main([str(run), str(photos), '--out', str(new), '--on_error', 'skip', '--overwrite'])


# Labels

def test_simulated_files_are_the_labels_of_a_training(home, tmp_path, capsys):
    "Written beside a data set they are its labels, and the very ones that it would simulate"
    for d in ('images', 'masks', 'codes.txt'): (tmp_path/d).symlink_to(home/d)
    labels.main(f'simulate --annotation scribble:length=0.5,seed=3 --data folder --path {home} '
                f'--split all --out {tmp_path}/scribble'.split())
    assert '12 label maps' in capsys.readouterr().out
    src = get_source('folder', tmp_path).check(read=True)
    assert list(src.released) == ['scribble']
    for i in src.images:
        assert (src.annotation(i, 'scribble') == src.annotation(i, 'sim_scribble:length=0.5,seed=3')).all()
    assert Image.open(tmp_path/'scribble'/f'{i}.png').mode == 'P'


def test_simulate_from_a_folder_of_masks(home, tmp_path):
    labels.main(f'simulate --annotation point --masks {home}/masks --out {tmp_path}/p'.split())
    assert len(list((tmp_path/'p').iterdir())) == 12
    i = folder(home).splits['train'][0]
    assert (read_label_map(tmp_path/'p'/f'{i}.png') == simulate(folder(home).mask(i), 'point', i)).all()


def test_tags_written_counted_and_trained_from(home, tmp_path, capsys):
    for d in ('images', 'codes.txt'): (tmp_path/d).symlink_to(home/d)
    (tmp_path/'masks').mkdir()
    (tmp_path/'masks/val').symlink_to(home/'masks/val')        # the training images have tags and nothing else
    labels.main(f'tags --data folder --path {home} --out {tmp_path}/tags.csv'.split())
    assert '12 images' in capsys.readouterr().out
    src, masks = get_source('folder', tmp_path).check(read=True), folder(home)
    assert all(src.tags(i) == masks.tags(i) for i in src.images)
    labels.main(f'stats --data folder --path {tmp_path} --annotation tag --out {tmp_path}/counts'.split())
    text = capsys.readouterr().out
    assert 'tags of 8 images (folder train)' in text and 'images that two classes are both in' in text
    names = sorted(f.name for f in (tmp_path/'counts').iterdir())
    assert names == ['images.csv', 'labels.csv', 'labels.png', 'together.csv']
    rows = list(csv.DictReader((tmp_path/'counts/labels.csv').open()))
    assert [int(r['images']) for r in rows] == [sum(c in masks.tags(i) for i in masks.splits['train'])
                                                for c in range(6)]
    out = tmp_path/'run'
    train.main(f'--data folder --path {tmp_path} --annotation tag --method afa:affinity=0 --epochs 1 '
               f'--model segformer_test_resnet --size 64 --bs 4 --device cpu --out {out}'.split())
    assert json.loads((out/'result.json').read_text())['settings']['annotation'] == 'tag'


def test_simulated_without_novel_classes(home, tmp_path):
    labels.main(['simulate', '--annotation', 'dense:novel=plain ring', '--data', 'folder', '--path', str(home),
                 '--out', str(tmp_path/'dense')])
    for i in folder(home).splits['train']:
        mask, written = folder(home).mask(i), read_label_map(tmp_path/'dense'/f'{i}.png')
        assert (written == np.where(mask == 5, 255, mask)).all()


def test_faults_of_tags(home, tmp_path, capsys):
    def bad(args, *words): fails(labels.main, args, capsys, *words)
    (tmp_path/'tags.csv').write_text('')
    bad(['tags', '--data', 'folder', '--path', home, '--out', tmp_path/'tags.csv'], 'there already', '--overwrite')
    bad(['tags', '--data', 'folder', '--path', home, '--out', tmp_path/'new.csv', '--split', 'test'], '--split test')
    bad(['stats', '--data', 'folder', '--path', home, '--annotation', 'tag:novel=moon'], "no class 'moon'")
    bad(['simulate', '--masks', home/'masks', '--annotation', 'point:novel=moon', '--out', tmp_path/'new'],
        'novel needs the names of classes')
    with pytest.raises(SystemExit):
        train.main(['--data', 'folder', '--path', str(home), '--annotation', 'dense:novel=moon',
                    '--out', str(tmp_path/'run')])
    expected = "sasformer_train: error: annotation 'dense:novel=moon': folder has no class 'moon'"
    assert capsys.readouterr().err.startswith(expected)
    assert not (tmp_path/'new').exists() and not (tmp_path/'run').exists()


def test_simulate_faults(home, tmp_path, capsys):
    new, before = tmp_path/'new', files(home)
    def bad(args, *words): fails(labels.main, ['simulate', *args, '--out', new], capsys, *words)
    bad([], '--data', '--masks')
    bad(['--data', 'scenes', '--masks', home/'masks'], '--data', '--masks')
    bad(['--masks', home/'masks', '--split', 'train'], '--split')
    bad(['--masks', tmp_path/'none'], tmp_path/'none')
    bad(['--masks', home/'masks', '--annotation', 'blob'], 'blob')
    bad(['--masks', home/'masks', '--annotation', 'scribble:length=2'], 'length=2')
    bad(['--data', 'folder', '--path', tmp_path/'none'], tmp_path/'none')
    bad(['--data', 'folder'], 'folder')
    bad(['--data', 'folder', '--path', home, '--split', 'test'], '--split', 'test')
    bad(['--data', 'nothing'], '--data')
    fails(labels.main, ['simulate', '--masks', home/'masks'], capsys, '--out')
    assert not new.exists()
    fails(labels.main, ['simulate', '--masks', home/'masks'/'train', '--out', home/'masks'/'train', '--overwrite'],
          capsys, 'is itself read')
    fails(labels.main, ['simulate', '--data', 'folder', '--path', home, '--out', home/'images'/'train', '--overwrite'],
          capsys, 'is itself read')
    labels.main(['simulate', '--masks', str(home/'masks'), '--out', str(new)])
    written = files(new)
    bad(['--masks', home/'masks'], 'there already', '--overwrite')
    assert files(new) == written and files(home) == before


@pytest.fixture
def published(home, tmp_path):
    "A points file, its background, and a zip of scribbles in two sets, for two of the images"
    i, j = folder(home).splits['train'][:2]
    (tmp_path/'fg.json').write_text(json.dumps({i: [dict(cls=2, x=20, y=10, rank=1)],
                                                j: [dict(cls=5, x=1, y=2, rank=1)]}))
    (tmp_path/'bg.json').write_text(json.dumps({i: [dict(cls=0, x=50, y=50, rank=1)]}))
    xml = ('<annotation><size><width>64</width><height>64</height></size><polygon><tag>{}</tag>'
           '<point><X>5</X><Y>8</Y></point><point><X>60</X><Y>8</Y></point></polygon></annotation>')
    with zipfile.ZipFile(tmp_path/'s.zip', 'w') as z:
        z.writestr(f'top/voc/{i}.xml', xml.format('cat'))
        z.writestr(f'top/other/{i}.xml', xml.format('grass'))
    return tmp_path, i, j


def test_convert_points(home, published):
    path, i, j = published
    labels.main(f'convert {path}/fg.json --background {path}/bg.json --images {home}/images '
                f'--width 5 --out {path}/point'.split())
    m = read_label_map(path/'point'/f'{i}.png', shape=(64, 64))
    assert m[10, 20] == 2 and m[50, 50] == 0 and (m == 2).sum() == 21
    assert read_label_map(path/'point'/f'{j}.png')[2, 1] == 5
    (path/'ids.txt').write_text(j)
    labels.main(f'convert {path}/fg.json --images {home}/images --ids {path}/ids.txt --out {path}/one'.split())
    assert [p.stem for p in (path/'one').iterdir()] == [j]


def test_convert_scribbles(home, published):
    path, i, _ = published
    labels.main(f'convert {path}/s.zip --within top/voc --out {path}/a'.split())
    assert read_label_map(path/'a'/f'{i}.png')[8, 30] == SCRIBBLE_TAGS.index('cat')
    (path/'names.txt').write_text('sky\ngrass\n')
    labels.main(f'convert {path}/s.zip --within top/other --classes {path}/names.txt --images {home}/images '
                f'--width 1 --out {path}/b'.split())
    m = read_label_map(path/'b'/f'{i}.png', 2)
    assert m[8, 30] == 1 and (m == 1).sum() == 56


def test_convert_faults(home, published, capsys):
    path, i, _ = published
    new, images = path/'new', home/'images'
    def bad(args, *words): fails(labels.main, ['convert', *args, '--out', new], capsys, *words)
    bad([path/'fg.json'], '--images')
    bad([path/'none.json', '--images', images], 'none.json')
    bad([path/'fg.json', '--images', path/'none'], path/'none')
    bad([path/'fg.json', '--images', images/'val'], images/'val', i)
    bad([path/'fg.json', '--images', images, '--background', path/'none.json'], 'none.json')
    bad([path/'fg.json', '--images', images, '--within', 'a'], '--within')
    bad([path/'fg.json', '--images', images, '--width', '4'], '--width', '4')
    bad([path/'fg.json', '--images', images, '--outside', 'away'], '--outside')
    bad([path/'fg.json', '--images', images, '--classes', path/'none.txt'], 'none.txt')
    bad([path/'s.zip', '--background', path/'bg.json'], '--background')
    bad([path/'s.zip'], 'within')
    bad([path/'s.zip', '--within', 'nothing'], 'nothing')
    bad([path/'none.zip'], 'none.zip')
    (path/'ids.txt').write_text('nobody')
    bad([path/'fg.json', '--images', images, '--ids', path/'ids.txt'], '--ids', 'nobody')
    bad([path/'fg.json', '--images', images, '--ids', path/'none.txt'], 'none.txt')
    assert not new.exists()
    fails(labels.main, ['convert', path/'fg.json', '--images', images, '--out', images/'train', '--overwrite'], capsys,
          'is itself read')


def test_stats(home, tmp_path, capsys):
    out = tmp_path/'stats'
    labels.main(f'stats --data folder --path {home} --annotation point --out {out}'.split())
    text, src = capsys.readouterr().out, folder(home)
    maps = [src.annotation(i, 'point') for i in src.splits['train']]
    assert f"{100*np.mean([m < 254 for m in maps]):.2f} % of the pixels of 8 images" in text
    rows = list(csv.DictReader((out/'labels.csv').open()))
    assert [r['class'] for r in rows] == src.classes
    assert [int(r['labelled']) for r in rows] == [sum(int((m == c).sum()) for m in maps) for c in range(6)]
    assert [r['image'] for r in csv.DictReader((out/'images.csv').open())] == src.splits['train']
    Image.open(out/'labels.png').verify()
    before = files(out)
    fails(labels.main, ['stats', '--data', 'folder', '--path', home, '--annotation', 'point', '--out', out], capsys,
          'there already', '--overwrite')
    fails(labels.main, ['stats', '--data', 'folder', '--path', home, '--split', 'test'], capsys, '--split')
    fails(labels.main, ['stats', '--data', 'folder', '--path', home, '--annotation', 'dots'], capsys, 'dots')
    fails(labels.main, ['stats'], capsys, '--data')
    assert files(out) == before
    labels.main(f'stats --data folder --path {home} --annotation sim_scribble --split val'.split())
