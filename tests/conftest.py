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
