"What the tests share"
import os
from pathlib import Path

import matplotlib
import pytest

matplotlib.use('Agg')

@pytest.fixture(scope='session')
def data_dir():
    "The folder of real data that `SASFORMER_DATA` names"
    path = Path(os.environ.get('SASFORMER_DATA', ''))
    if not os.environ.get('SASFORMER_DATA') or not path.is_dir(): pytest.skip("SASFORMER_DATA names no folder: real data is not here")
    return path
