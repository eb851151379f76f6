"Two malformed inputs of every kind; `tests/malformed.py` makes more of them"
import pytest
from malformed import KINDS, case

@pytest.mark.parametrize('i', range(2*len(KINDS)), ids=lambda i: f'{list(KINDS)[i % len(KINDS)]}-{i//len(KINDS)}')
def test_malformed_inputs_are_refused_in_words_that_name_them(i):
    name, what, text = case(i, seed=0)
    assert what == 'refused', f'{name}: {what}: {text}'
