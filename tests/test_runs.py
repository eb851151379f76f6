"Runs and labels of which nothing may be lost or go unsaid: folders, locks, divergence, labels, data options"
import json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from conftest import write_folder
from sasformer import evaluate, train
from sasformer.annotations import write_label_map
from sasformer.datasets import folder, scenes
from test_cli import fails

ARGS = '--data scenes:n_train=8,n_val=2,size=64 --method baseline --epochs 1 --size 64 --bs 4 --device cpu'.split()


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A finished run"
    out = tmp_path_factory.mktemp('runs')/'done'
    train.main([*ARGS, '--out', str(out)])
    return out


@pytest.fixture
def home(tmp_path):
    path = tmp_path/'set'
    write_folder(scenes(n_train=6, n_val=2, size=64), path)
    return path


def test_a_diverged_training_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: train.main([*ARGS, '--lr', '1e30', '--out', str(tmp_path/'run')])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and 'epoch 1: the training has diverged' in err.splitlines()[-1]
    assert not list((tmp_path/'run').glob('*.safetensors'))
    train.main([*ARGS, '--out', str(tmp_path/'run')])      # the first try is in nobody's way
    assert json.loads((tmp_path/'run/settings.json').read_text())['recipe']['lr'] < 1


@pytest.mark.parametrize('lr', ('nan', 'inf', '-1'))
def test_numbers_are_finite(tmp_path, capsys, lr):
    fails(train.main, [*ARGS, f'--lr={lr}', '--out', tmp_path/'run'], capsys, 'lr')


def test_files_of_others_stay(tmp_path, capsys):
    (tmp_path/'log.csv').write_text('mine')
    fails(train.main, [*ARGS, '--out', tmp_path], capsys, tmp_path, 'log.csv')
    assert [p.name for p in tmp_path.iterdir()] == ['log.csv'] and (tmp_path/'log.csv').read_text() == 'mine'


def test_a_state_that_was_deleted_is_not_forgotten(done, tmp_path, capsys):
    copy = shutil.copytree(done, tmp_path/'run')
    (copy/'state.pt').unlink()
    before = (copy/'best.safetensors').read_bytes()
    fails(train.main, [*ARGS, '--seed', '3', '--out', copy], capsys, 'best.safetensors')
    assert (copy/'best.safetensors').read_bytes() == before


def test_two_trainings_do_not_mix(tmp_path):
    code = ("import sys, time; from sasformer.programs import lock_file; "
            f"f = lock_file({str(tmp_path/'.lock')!r}); print(f is not None, flush=True); time.sleep(600)")
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'True\n'
        with pytest.raises(SystemExit): train.main([*ARGS, '--out', str(tmp_path)])
        assert not (tmp_path/'log.csv').exists()
    finally: other.kill(); other.wait()
    train.main([*ARGS, '--out', str(tmp_path)])    # its death has released the lock
    assert (tmp_path/'result.json').exists()


def test_pictures_are_made_up_for(done, tmp_path):
    copy = shutil.copytree(done, tmp_path/'run')
    for name in ('curves', 'examples'): (copy/f'{name}.png').unlink()
    weights = (copy/'last.safetensors').read_bytes()
    train.main([*ARGS, '--resume', '--out', str(copy)])
    assert (copy/'curves.png').exists() and (copy/'examples.png').exists()
    assert (copy/'last.safetensors').read_bytes() == weights


def test_a_run_knows_its_classes_and_images(home, tmp_path, capsys):
    args = f'--data folder --path {home} --method baseline --epochs 2 --size 64 --bs 2 --device cpu'.split()
    out = tmp_path/'run'
    train.main([*args, '--out', str(out)])
    import torch
    state = torch.load(out/'state.pt', weights_only=True)
    torch.save({**state, 'epochs': 1, 'rows': state['rows'][:1]}, out/'state.pt')   # as if it had been stopped
    (out/'result.json').unlink()
    codes = (home/'codes.txt').read_text()
    (home/'codes.txt').write_text('\n'.join(reversed(codes.split('\n')))[1:]+'\n')
    with pytest.raises(SystemExit): train.main([*args, '--resume', '--out', str(out)])
    assert 'began with the classes' in capsys.readouterr().err
    (home/'codes.txt').write_text(codes)
    first = next((home/'images/train').iterdir())
    first.rename(first.with_name('another'+first.suffix))
    mask = home/'masks/train'/f'{first.stem}.png'
    mask.rename(mask.with_name('another.png'))
    with pytest.raises(SystemExit): train.main([*args, '--resume', '--out', str(out)])
    assert '--allow_changes' in capsys.readouterr().err
    train.main([*args, '--resume', '--allow_changes', '--out', str(out)])


def test_a_run_is_found_from_elsewhere(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home.parent)
    train.main(f'--data folder --path set --method baseline --epochs 1 --size 64 --bs 2 --out {tmp_path}/run'.split())
    monkeypatch.chdir('/')
    evaluate.main([str(tmp_path/'run'), '--device', 'cpu'])
    assert 'mIoU' in capsys.readouterr().out


def test_masks_of_0_and_255(tmp_path, capsys):
    write_folder(scenes(n_train=4, n_val=2, size=64), tmp_path)
    for f in (tmp_path/'masks').rglob('*.png'):
        m = np.zeros((64, 64), np.uint8)
        m[20:40, 20:40] = 255
        write_label_map(f, m)
    (tmp_path/'codes.txt').write_text('ground\nhouse\n')
    args = f'--path {tmp_path} --annotation dense --method baseline --epochs 1 --size 64 --bs 2 --device cpu'.split()
    with pytest.raises(SystemExit): train.main(['--data', 'folder', *args, '--out', str(tmp_path/'a')])
    err = capsys.readouterr().err
    assert "'ground' is the only class" in err and 'values=255:1' in err
    train.main(['--data', 'folder:values=255:1', *args, '--out', str(tmp_path/'b')])   # what the message names works
    assert list(folder(tmp_path, values={255: 1}).judge('dense')) == []


def test_scribbles_that_label_everything(home, capsys, tmp_path):
    src = folder(home)
    (home/'scribble/train').mkdir(parents=True)
    for i in src.splits['train']:
        m = src.mask(i)
        m[::2] = 0                                           # 0 where nothing was drawn, ids from 1
        write_label_map(home/'scribble/train'/f'{i}.png', np.where(m < 5, m+1, m)*(np.arange(64)[:,None] % 2))
    assert 'zero_is_unlabelled=true' in ' '.join(folder(home).judge('scribble'))
    said = folder(home, zero_is_unlabelled=True).judge('scribble')
    assert 'zero_is_unlabelled' not in ' '.join(said)


def test_sparse_labels_with_masks_for_validation_only(home):
    src = folder(home)
    (home/'scribble/train').mkdir(parents=True)
    for i in src.splits['train'][:4]: write_label_map(home/'scribble/train'/f'{i}.png', src.annotation(i, 'scribble'))
    shutil.rmtree(home/'masks/train')
    few = folder(home).check()
    assert few.splits['train'] == src.splits['train'][:4] and few.splits['val'] == src.splits['val']
    assert (few.mask(few.splits['val'][0]) == src.mask(src.splits['val'][0])).all()


@pytest.mark.parametrize('raw, ok', ((b'\xef\xbb\xbfsky\nroad\n', True), ('sky\nroad\n'.encode('utf-16'), True),
                                     (b'sky\n\nroad\n', False), (b'H\xe4user\nroad\n', False), (b'sky\nsky\n', False)))
def test_class_names_as_people_have_them(tmp_path, raw, ok):
    write_folder(scenes(n_train=4, n_val=2, size=64), tmp_path)
    (tmp_path/'codes.txt').write_bytes(raw)
    if ok: assert folder(tmp_path).classes == ['sky', 'road']
    else:
        with pytest.raises((OSError, ValueError), match='codes.txt|twice'): folder(tmp_path)


@pytest.mark.parametrize('encoding', ('cp1252', 'ascii'))
def test_consoles_without_an_arrow(tmp_path, encoding):
    done = subprocess.run([sys.executable, '-m', 'sasformer.train', *ARGS, '--out', str(tmp_path/'run')],
                          env={**os.environ, 'PYTHONIOENCODING': encoding}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert b'->' in done.stdout


def test_results_are_json(tmp_path):
    from sasformer.annotations import write_json
    write_json(tmp_path/'a.json', dict(miou=float('nan'), rows=[1., float('inf')]))
    refuse = lambda constant: pytest.fail(constant)
    assert json.loads((tmp_path/'a.json').read_text(), parse_constant=refuse) == dict(miou=None, rows=[1., None])


def test_onnx_gives_the_same_masks(done, tmp_path):
    from sasformer.export import main
    from sasformer.inference import predict_image
    main([str(done), str(tmp_path/'model.onnx')])
    written, ours = evaluate.open_model(tmp_path/'model.onnx'), evaluate.open_model(done)
    assert written.classes == ours.classes and (written.palette == np.asarray(ours.palette)).all()
    photo = np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    assert (predict_image(written, photo) == predict_image(ours, photo)).mean() > .999
