"What nbdev leaves to discipline: export in sync, clean notebooks and outputs without private paths, README up to date"
import ast, difflib, filecmp, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
ids = [str(p.relative_to(ROOT)) for p in NOTEBOOKS]

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the repository with everything exported and cleaned anew"
    copy = tmp_path_factory.mktemp('copy')/'sasformer'
    ignored = shutil.ignore_patterns('.venv', '.git', '*.egg-info', '__pycache__', 'runs', 'demo', 'results',
                                     '.pytest_cache', '.ipynb_checkpoints')
    shutil.copytree(ROOT, copy, ignore=ignored)
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
    seen = [{k: v for k, v in o.get('data', o).items() if not k.startswith('image/')} for o in outputs]
    text = ' '.join(map(json.dumps, seen)) + ' '.join(''.join(c['source']) for c in nb['cells'])
    private = re.findall(r'(?:/home/|/root/|/work/|/Users/|/tmp/|[A-Z]:\\\\)[\w.-]+', text)
    assert not private, private
    first = ''.join(nb['cells'][0]['source'])
    opens = re.match(r'# .+\n+> .+', first)
    assert opens, f'a notebook opens with "# Title" and "> subtitle", this one with {first[:60]!r}'
    counts = [c['execution_count'] for c in code if c['execution_count'] is not None]
    assert counts == sorted(counts), 'cells were not executed from top to bottom'

def test_readme_is_made_from_its_notebook():
    sys.path.insert(0, str(ROOT/'tests'))
    from render_readme import render
    assert (ROOT/'README.md').read_text() == render(), 'run make readme'

def test_pictures_of_the_readme_are_here():
    "And small: they are a part of every clone"
    pictures = re.findall(r'!\[[^]]*\]\(([^)]+)\)', (ROOT/'README.md').read_text())
    assert pictures, 'the first screen shows a picture'
    sizes = {p: (ROOT/p).stat().st_size if (ROOT/p).is_file() else None for p in pictures}
    assert all(n and n < 150_000 for n in sizes.values()), sizes

def test_pages_open_with_a_picture():
    "What is read first, and each method's notebook, shows what it does within five cells"
    def has_picture(cell): return any('image/png' in o.get('data', {}) for o in cell.get('outputs', ()))
    for name in ('quickstart', '07_treefilter', '18_refine', '20_sasformer', '21_tel', '26_crf'):
        assert any(map(has_picture, json.loads((ROOT/f'nbs/{name}.ipynb').read_text())['cells'][:5])), name

def test_quickstart_runs_on_any_folder():
    "From 'Look at it' on, the page uses nothing of the example but the names that it tells readers to set"
    cells = json.loads((ROOT/'nbs/quickstart.ipynb').read_text())['cells']
    sources = [''.join(c['source']) for c in cells]
    start = next(i for i, s in enumerate(sources) if s.startswith('## Look at it'))
    def names(cells, kind):
        shown = [''.join(c['source']) for c in cells
                 if c['cell_type'] == 'code' and not c['source'][0].startswith('#| hide')]
        nodes = list(ast.walk(ast.parse('\n'.join(shown))))
        made = {n.arg for n in nodes if isinstance(n, ast.arg)} if kind is ast.Store else set()
        return made | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}
    page = re.search(r'```python\n(.*?)```', sources[0], re.S)[1]
    told = {n.id for n in ast.walk(ast.parse(page)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    example = names(cells[:start], ast.Store)
    assert told <= example, 'the example sets what a reader is told to set'
    left = (names(cells[start:], ast.Load)-names(cells[start:], ast.Store)) & example
    assert left <= told, f'the page goes on with {left-told} of its example'

# Every call that removes something: notebook or script, the call, and why what it removes is its own
REMOVALS = [
    ('annotations', 'unfinished.unlink(missing_ok=True)', "the temporary file that this function has just written"),
    ('datasets', "(p / 'masks/a.png').unlink()", "in the temporary folder of its cell"),
    ('datasets', "shutil.rmtree(p / 'masks')", "in the temporary folder of its cell"),
    ('downloads', 'shutil.rmtree(tmp, ignore_errors=True)', "from mkdtemp, five lines above"),
    ('datasets', 'shutil.rmtree(tmp, ignore_errors=True)', "from mkdtemp, in the same function"),
    ('downloads', 'tagfile.unlink(missing_ok=True)', "the `.part.tag` that a download keeps beside its `.part`"),
    ('downloads', 'part.unlink(missing_ok=True)', "the `.part` of a download"),
    ('downloads', 'part.unlink()', "the `.part` of a download, whose checksum is wrong"),
    ('downloads', "part.with_name(part.name + '.tag').unlink(missing_ok=True)", "the tag of a download that is whole"),
    ('downloads', 'archive.unlink()', "an archive that this call fetched; `keep` is set where it lay there before"),
    ('learner', 'left.unlink()', "half a file of a run whose process was killed; only names that a run writes"),
    ('learner', "(self.folder / '.lock').unlink()", "the lock that this run holds"),
    ('datasets', "shutil.rmtree(p / 'scribble')", "in the temporary folder of its cell"),
    ('learner', "(Path(tmp) / 'cut' / f).unlink()", "in the temporary folder of its cell"),
    ('annotate', 'file.unlink(missing_ok=True)', "a label map without any label; undo brings them back"),
    ('inference', "(photos / 'cut.jpg').unlink()", "written three lines above, in the notebook's temporary folder"),
    ('inference', "(photos / f'{i}.png').unlink()", "written two lines above, in the notebook's temporary folder"),
]

def removals(code):
    "The calls in Python code, and the shell commands in strings and magics, that remove files or folders"
    lines = code.splitlines()
    removes = r'\b(rm|rmdir|unlink|find .*-delete)\b'
    shell = [l.strip() for l in lines if re.match(r'\s*[!%]', l) and re.search(removes, l)]
    if lines and lines[0].startswith('%%'): return shell + [l for l in lines if re.search(r'\brm\b', l)]
    tree = ast.parse('\n'.join('' if re.match(r'\s*[!%]', l) else l for l in lines))
    functions = {'rmtree', 'unlink', 'rmdir', 'removedirs', 'remove'}
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported = {a.asname or a.name for n in imports for a in n.names if a.name in functions}
    found = []
    for n in ast.walk(tree):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and re.search(r'\brm -', n.value):
            found.append(n.value)
        if not isinstance(n, ast.Call): continue
        if isinstance(n.func, ast.Name) and n.func.id in imported: found.append(ast.unparse(n))
        if not isinstance(n.func, ast.Attribute): continue
        name, owner = n.func.attr, ast.unparse(n.func.value)
        # of all `remove`, only that of `os` removes files: others take an item off a list, or a hook off a module
        if name in functions and (name != 'remove' or owner == 'os'): found.append(ast.unparse(n))
    return shell + found

def sources():
    "Every notebook and script, by its name without number and ending: its pieces of code"
    for p in NOTEBOOKS:
        cells = json.loads(p.read_text())['cells']
        yield re.sub(r'^\d+_', '', p.stem), [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    for p in [*(ROOT/'sasformer').glob('*.py'), ROOT/'tests/render_readme.py', ROOT/'setup.py']:
        yield p.stem, [p.read_text()]

def test_nothing_removes_what_it_did_not_make():
    "A notebook that a reader follows with their own photographs must leave them where they are"
    found = {(name, call) for name, pieces in sources() for code in pieces for call in removals(code)}
    known = {(name, call) for name, call, _ in REMOVALS}
    assert not found - known, f'removes files that it may not have made: {sorted(found - known)}'
    assert not known - found, f'these calls are gone, take them off the list: {sorted(known - found)}'

@pytest.mark.parametrize('code', [
    'shutil.rmtree(root.parent)', 'from shutil import rmtree as away\naway(root)', 'os.remove(f)', 'f.unlink()',
    '!rm -r {root}', "%%bash\nrm -r photos", "subprocess.run('rm -rf photos', shell=True)",
    'import os\nos.removedirs(d)'])
def test_removals_are_seen(code): assert removals(code)

def test_other_removals_are_none(): assert not removals("hook.remove()\nnames.remove('a')\nt.rename(columns=c)")

def test_code_is_written_one_way():
    "tests/dialect.py says how; `python tests/dialect.py --repair` mends what a program can mend"
    sys.path.insert(0, str(ROOT/'tests'))
    from dialect import complaints, pieces
    found = [f'{name}, line {c}' for name, code in pieces() for c in complaints(code)]
    assert not found, f'{len(found)} lines, such as\n' + '\n'.join(found[:10])

def test_a_notebook_imports_only_from_smaller_numbers():
    "Between modules of the package; what is imported inside a function counts too, but for what a program starts"
    numbers = {m[1]: p.stem.split('_')[0] for p in NOTEBOOKS for c in json.loads(p.read_text())['cells']
               if (m := re.match(r'#\|\s*default_exp (\w+)', ''.join(c['source'])))}
    wrong = []
    for p in (ROOT/'sasformer').glob('[!_]*.py'):
        for m in re.finditer(r'^( *)(?:from \.(\w+) import|from sasformer\.(\w+) import|import sasformer\.(\w+))',
                             p.read_text(), re.M):
            other, inside = next(o for o in m.groups()[1:] if o), m[1]
            if numbers[other] < numbers[p.stem]: continue
            if inside and p.stem == 'methods': continue   # makes a method's callbacks when it is asked for them
            wrong.append(f'{p.stem} ({numbers[p.stem]}) imports {other} ({numbers[other]})')
    assert not wrong, wrong
