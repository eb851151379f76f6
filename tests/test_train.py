"Training as users start it: several processes, killed and resumed, and what a run leaves behind"
import csv, json, os, socket, subprocess, sys, time

import pytest
import torch
from conftest import Forked
from safetensors.torch import load_file
from sasformer import train
from sasformer.recipes import recipe

# small enough for seconds; float32 and no dropout, so that processes and restarts can be compared; SGD, because Adam's
# first steps are signs of gradients, which blow the rounding of sums in another order up
SMALL = ('--data scenes:n_train=64,n_val=8 --annotation scribble --size 64 --bs 16 --opt sgd --lr 1e-2 '
         '--precision fp32 --drop_path 0 --dropout 0 --method sasformer:form=released --validate_every 1 '
         '--decoder_dim 64').split()

def start(*args):
    "The command in a process of its own"
    return Forked(train.main, SMALL+[str(a) for a in args])

def launch(*args, processes=2):
    "The command under torchrun, as a shell would run it; what it prints"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(processes),
               '--master_port', str(port), '-m', 'sasformer.train', *SMALL, *map(str, args)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    return done.stdout

def kill_in_second_epoch(p, out):
    "SIGKILL, once the first epoch is kept and the second has begun"
    try:
        until = time.time()+300
        while not (out/'state.pt').exists():
            assert p.poll() is None and time.time() < until, p.printed
            time.sleep(.02)
        time.sleep(.3)
    finally: p.kill()
    assert not (out/'result.json').exists()

def rows(folder): return list(csv.DictReader((folder/'log.csv').open()))
def weights(folder): return load_file(folder/'last.safetensors')

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run in one process, and what it printed"
    out = tmp_path_factory.mktemp('runs')/'whole'
    return out, start('--epochs', 2, '--out', out).finish()

def test_a_run_and_its_folder(whole):
    out, printed = whole
    assert printed.startswith('1 process on cpu')
    assert sum(line.startswith('epoch ') for line in printed.splitlines()) == 2     # one plain line per epoch
    assert '\r' not in printed and '\x1b' not in printed                           # and no control characters
    assert 'fp32' in printed.splitlines()[0]
    names = {f.name for f in out.iterdir()}
    assert names == {'settings.json', 'log.csv', 'result.json', 'state.pt', 'model.json',
                     'best.safetensors', 'last.safetensors', 'curves.png', 'examples.png'}
    result = json.loads((out/'result.json').read_text())
    assert result['settings']['options']['sasformer']['alpha'] == 1.2
    assert result['precision'] == 'fp32' and len(result['curve']) == 2
    assert result['peak_memory_mb'] > 0
    # the recipe's affinity loss starts in the middle
    assert rows(out)[0]['aff1'] == '' and float(rows(out)[-1]['aff1']) > 0

def test_two_processes_equal_one(whole, tmp_path):
    "Same global batch: same losses (1e-3 relative) and metrics (2e-3 absolute); float32 sums in another order"
    one, _ = whole
    out = tmp_path/'two'
    printed = launch('--epochs', 2, '--out', out)
    assert '2 processes on cpu' in printed
    assert json.loads((out/'result.json').read_text())['processes'] == 2
    for a, b in zip(rows(one), rows(out), strict=True):
        for name in ('train_loss', 'valid_loss', 'miou', 'pixel_accuracy', 'mean_accuracy', 'aff1', 'aff4'):
            assert (a[name] == '') == (b[name] == '')
            near = 2e-3 if name in ('miou', 'pixel_accuracy', 'mean_accuracy') else 1e-5
            assert float(b[name] or 0) == pytest.approx(float(a[name] or 0), rel=1e-3, abs=near), name

def test_killed_and_resumed(whole, tmp_path):
    "SIGKILL in the middle of an epoch, then --resume: the weights of the uninterrupted run, bit for bit"
    one, _ = whole
    out = tmp_path/'cut'
    kill_in_second_epoch(start('--epochs', 2, '--out', out), out)
    again = start('--epochs', 2, '--out', out)
    again.process.join()
    assert again.poll() == 2 and 'resume it' in again.printed
    start('--epochs', 2, '--out', out, '--resume').finish()
    a, b = weights(one), weights(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r['miou'] for r in rows(one)] == [r['miou'] for r in rows(out)]
    # as if killed while the first picture was written: --resume draws it, and leaves nothing of the dead process
    (out/'curves.png').rename(out/'.curves.png.12345.tmp')
    start('--epochs', 2, '--out', out, '--resume').finish()
    assert (out/'curves.png').exists() and not list(out.glob('.*.tmp'))


def test_stride_stays_with_mit():
    "The stride of a recipe is that of its MiT: another backbone does not inherit it, and none takes it"
    assert recipe('scenes').last_stride == 1 and recipe('scenes', model='segformer_mit_b1').last_stride == 1
    assert recipe('scenes', model='segmenter_vit_tiny_patch16_224').last_stride is None
    with pytest.raises(ValueError, match='last_stride=1: only MiT has it, not segformer_resnet18'):
        recipe('scenes', model='segformer_resnet18', last_stride=1)
