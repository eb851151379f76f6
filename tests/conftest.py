"What the tests share"
import multiprocessing, os, random, socket, sys, tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

matplotlib.use('Agg')

@pytest.fixture(scope='session')
def data_dir():
    "The folder of real data that `SASFORMER_DATA` names"
    path = Path(os.environ.get('SASFORMER_DATA', ''))
    if not os.environ.get('SASFORMER_DATA') or not path.is_dir():
        pytest.skip("SASFORMER_DATA names no folder: real data is not here")
    return path


def rounding(b, exact, times=10):
    """What float32 may make of a computation on any machine: `times` the error that its plain version `b` has itself,
    against the same in float64 (`exact`), and never less than so many roundings of the largest value"""
    return times*max((b.double()-exact).abs().max().item(), torch.finfo(torch.float32).eps*exact.abs().max().item())


class KeepPrecision(TorchFunctionMode):
    "transformers makes each softmax in float32; here it stays in the precision of its input"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.softmax: kwargs = {n: a for n, a in kwargs.items() if n != 'dtype'}
        return func(*args, **(kwargs or {}))


class Forked:
    """`f(*args)` in a fork of this process: one that can be killed, without the ten seconds of a new one's imports.
    Its random numbers begin anew, as those of a new one do; what it prints goes into a file"""
    def __init__(self, f, *args, **env):
        self.log = tempfile.TemporaryFile('w+', buffering=1)
        self.process = multiprocessing.get_context('fork').Process(target=self._run, args=(f, args, env))
        self.process.start()

    def _run(self, f, args, env):
        os.environ.update(CUDA_VISIBLE_DEVICES='', ACCELERATE_USE_CPU='true', **env)
        sys.stdout = sys.stderr = self.log
        torch.set_num_threads(1)   # OpenMP's threads are not forked, and whoever waits for them waits forever
        random.seed(), np.random.seed(), torch.seed()
        f(*args)

    @property
    def printed(self):
        self.log.seek(0)
        return self.log.read()

    def poll(self): return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()

    def finish(self, timeout=300):
        self.process.join(timeout)
        assert self.process.exitcode == 0, self.printed
        return self.printed


def connected(f, *args):
    "`f(*args)` in a process that a launcher has started, PyTorch's processes connected"
    import torch.distributed as dist
    dist.init_process_group('gloo')
    f(*args)
    dist.barrier()
    dist.destroy_process_group()   # left to the end of the process, its threads may outlive it


def fork_two(f, *args):
    "`f(*args)` in two processes, as a launcher would start them"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    return [Forked(f, *args, **env, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]


def write_folder(src, path):
    "A data set's images, masks and class names in the layout of `folder`"
    from sasformer.annotations import write_label_map
    for split, ids in src.splits.items():
        for d in ('images', 'masks'): (path/d/split).mkdir(parents=True)
        for i in ids:
            src.image(i).save(path/'images'/split/f'{i}.png')
            write_label_map(path/'masks'/split/f'{i}.png', src.mask(i), src.palette)
    (path/'codes.txt').write_text('\n'.join(src.classes))
