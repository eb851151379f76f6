"What nbdev leaves to discipline: export in sync, clean notebooks, no errors and no private paths in outputs, README from its notebook"
import difflib, filecmp, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
ids = [str(p.relative_to(ROOT)) for p in NOTEBOOKS]

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the repository with everything exported and cleaned anew"
    copy = tmp_path_factory.mktemp('copy')/'sasformer'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.venv', '.git', '*.egg-info', '__pycache__', 'runs', 'demo', 'results', '.pytest_cache', '.ipynb_checkpoints'))
    code = 'from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()'
    done = subprocess.run([sys.executable, '-c', code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy

def test_export_is_in_sync(exported):
    ours, theirs = ({p.name: p.read_text() for p in (d/'sasformer').glob('*.py')} for d in (ROOT, exported))
    assert ours.keys() == theirs.keys()
    for name in ours:
        diff = list(difflib.unified_diff(ours[name].splitlines(), theirs[name].splitlines(), lineterm='', n=0))
        assert not diff, f'{name} is not what the notebooks export (nbdev_export):\n' + '\n'.join(diff[:20])

def test_notebooks_are_clean(exported):
    dirty = [p for p in ids if not filecmp.cmp(ROOT/p, exported/p, shallow=False)]
    assert not dirty, f'run nbdev_clean: {dirty}'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=ids)
def test_outputs(path):
    "Executed, without errors, and without a path of somebody's machine"
    nb = json.loads(path.read_text())
    code = [c for c in nb['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
    outputs = [o for c in code for o in c['outputs']]
    assert not [o['ename'] for o in outputs if o['output_type'] == 'error']
    text = ' '.join(json.dumps({k: v for k, v in o.get('data', o).items() if not k.startswith('image/')}) for o in outputs) + ' '.join(''.join(c['source']) for c in nb['cells'])
    private = re.findall(r'(?:/home/|/root/|/work/|/Users/|/tmp/|[A-Z]:\\\\)[\w.-]+', text)
    assert not private, private
    first = ''.join(nb['cells'][0]['source'])
    assert re.match(r'# .+\n+> .+', first), f'a notebook opens with "# Title" and "> subtitle", this one with {first[:60]!r}'
    counts = [c['execution_count'] for c in code if c['execution_count'] is not None]
    assert counts == sorted(counts), 'cells were not executed from top to bottom'

def test_readme_is_made_from_its_notebook():
    sys.path.insert(0, str(ROOT/'tests'))
    from render_readme import render
    assert (ROOT/'README.md').read_text() == render(), 'run make readme'
