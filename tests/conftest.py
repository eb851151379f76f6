"What the tests share"
import os
from pathlib import Path

import matplotlib
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


def write_folder(src, path):
    "A data set's images, masks and class names in the layout of `folder`"
    from sasformer.annotations import write_label_map
    for split, ids in src.splits.items():
        for d in ('images', 'masks'): (path/d/split).mkdir(parents=True)
        for i in ids:
            src.image(i).save(path/'images'/split/f'{i}.png')
            write_label_map(path/'masks'/split/f'{i}.png', src.mask(i), src.palette)
    (path/'codes.txt').write_text('\n'.join(src.classes))
