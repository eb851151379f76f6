"One call for a GPU: the rehearsal with parts that break, the judgement of targets, what travels"
import json, os, subprocess, sys, traceback
from types import SimpleNamespace
import pytest, torch
from sasformer import gpu

BROKEN = '''
import os, time
def dies(o):
    yield 'dies_first', dict(rows={})
    os._exit(3)
def raises(o):
    yield 'raises_first', dict(rows={})
    raise RuntimeError('on purpose')
def hangs(o):
    print('waiting', flush=True)
    time.sleep(3600)
    yield
'''


class ForkedPopen:
    "A worker as a fork of this process, without the half minute of a new one's imports"
    returncode = None
    def __init__(self, command, stdout, stderr, text, start_new_session, env):
        reads, writes = os.pipe()
        self.pid = os.fork()
        if self.pid: os.close(writes); self.stdout = os.fdopen(reads); return
        status = 1
        try:
            os.setsid(), os.dup2(writes, 1), os.dup2(stderr.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, 'w', 1), os.fdopen(2, 'w', 1)
            status = gpu.main(command[command.index('sasformer.gpu')+1:])
        except BaseException: traceback.print_exc()
        finally: os._exit(status)

    def wait(self):
        if self.returncode is None: self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


# at tiny size the first two are what b4 is; the last is always there
LIKE_B4 = 'step_mit_b0', 'step_mit_b1', 'summary'


@pytest.fixture(scope='module')
def rehearsal(tmp_path_factory):
    "All parts at tiny size, behind three that break off: exit status, folder"
    folder, patch = tmp_path_factory.mktemp('gpu'), pytest.MonkeyPatch()
    (folder/'broken.py').write_text(BROKEN)
    path = [str(folder), *filter(None, [os.environ.get('PYTHONPATH')])]
    patch.setenv('PYTHONPATH', ':'.join(path))
    patch.syspath_prepend(folder)
    patch.setattr(gpu, 'subprocess', SimpleNamespace(**{**vars(subprocess), 'Popen': ForkedPopen}))
    find = gpu.find_part
    patch.setattr(gpu, 'find_part', lambda name: (find(name)[0], .5) if name == 'broken:hangs' else find(name))
    broken = [f'broken:{name}' for name in ('dies', 'raises', 'hangs')]
    parts = [name for name in gpu.PARTS if name not in LIKE_B4]
    (folder/'out').mkdir()
    (folder/'out/old.json').write_text(json.dumps(dict(run='another', device='cuda', tiny=False, error='long ago')))
    status = gpu.main(['check', '--device', 'cpu', '--tiny', '--out', str(folder/'out'), '--parts', *broken, *parts])
    yield status, folder/'out'
    patch.undo()


def results(folder): return {f.stem: json.loads(f.read_text()) for f in folder.glob('*.json')}


def test_every_part_wrote_its_files(rehearsal):
    found = results(rehearsal[1])
    steps = {f'step_mit_b4_{classes}' for classes in (2, 21, 150)}
    trainings = {f'training_{method}{c}' for method in ('baseline', 'sasformer') for c in ('', '_compiled')}
    others = {'trees', 'inference_mit_b0', 'inference_mit_b4', 'summary'}
    expected = steps | trainings | others | {f'values_{c}' for c in gpu.CASES}
    assert expected <= found.keys() and any(name.startswith('cells_') for name in found)
    for name in expected:
        r = found[name]
        assert 'error' not in r and r['tiny'] and r['device'] == 'cpu', name
        assert r['environment']['torch'] == torch.__version__
    for name in steps: assert set(found[name]['rows']) == set(gpu.VARIANTS) and found[name]['flops'] > 0
    assert {r['part'] for r in found.values() if 'part' in r} >= set(gpu.PARTS)-set(LIKE_B4[:2])


def test_values_agree_with_float64(rehearsal):
    found = results(rehearsal[1])
    for case in gpu.CASES:
        rows = found[f'values_{case}']['rows']
        assert rows and all(r['agrees'] and r['device_error'] <= r['tolerance'] for r in rows.values())
    for form in ('paper', 'released', 'default'): assert f'{form}: queries' in found['values_affinity']['rows']


def test_a_failing_part_stops_no_other_and_shows_in_the_status(rehearsal):
    status, folder = rehearsal
    found = results(folder)
    assert status == 1
    errors = {name: r['error'] for name, r in found.items() if 'error' in r and name != 'old'}
    assert errors.keys() == found['summary']['failures'].keys() == {'broken_dies', 'broken_raises', 'broken_hangs'}
    assert 'exit status 3' in errors['broken_dies'] and errors['broken_raises'] == 'RuntimeError: on purpose'
    assert 'the time that it may take' in errors['broken_hangs']
    assert {'dies_first', 'raises_first'} <= found.keys()      # what was written before stays
    assert 'old' not in found['summary']['files'] and 'old' in found   # of an earlier run: neither counted nor removed


def test_a_rehearsal_measures_no_target(rehearsal):
    targets = results(rehearsal[1])['summary']['targets']
    assert {t['verdict'] for t in targets} == {'not measured'} and len(targets) == len(gpu.TARGETS)


def test_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'subprocess', subprocess)   # its worker, which has the summary to make, is a new process
    args = ['--device', 'cpu', '--tiny', '--out', str(tmp_path), '--parts', 'trees', '--seconds', '-1']
    assert gpu.main(['check', *args]) == 1
    found = results(tmp_path)
    assert found['trees']['error'].startswith('not run') and 'trees' in found['summary']['failures']


def step(affinity=1.05, memory=1.02, maps=1.4, share=.5, **kw):
    rows = dict(bare=dict(ms=100., ratio=1., memory_ratio=1., share_of_peak=share), maps=dict(ms=100*maps),
                affinity=dict(ms=100*affinity, ratio=affinity, memory_ratio=memory))
    return dict(dict(device='cuda', tiny=False, rows=rows), **kw)


def trees(colours, features): return step(rows={n: dict(ms=ms) for n, ms in zip(gpu.TREES, (colours, features))})


def verdicts(**results): return [row['verdict'] for row in gpu.judge(results)]


@pytest.mark.parametrize('change, target', [
    (dict(step_mit_b4_21=step(affinity=1.11)), 0), (dict(step_mit_b4_21=step(memory=1.09)), 1),
    (dict(step_mit_b4_150=step(affinity=1.16)), 2), (dict(step_mit_b0_2=step(affinity=1.05, maps=1.04)), 3),
    (dict(trees=trees(4., 10.1)), 4), (dict(step_mit_b4_21=step(share=.39)), 5)])
def test_targets(change, target):
    good = dict(step_mit_b4_21=step(1.1, 1.08, share=.4), step_mit_b4_150=step(1.15), step_mit_b0_2=step(),
                trees=trees(9., 10.))
    assert verdicts(**good) == ['met']*6
    assert verdicts(**{**good, **change}) == ['missed' if i == target else 'met' for i in range(6)]


def test_targets_need_real_numbers():
    for kw in (dict(tiny=True), dict(device='cpu'), dict(error='out of memory')):
        assert verdicts(step_mit_b4_21=step(**kw), trees=dict(trees(1., 1.), **kw)) == ['not measured']*6
    assert verdicts(step_mit_b4_21=step()) == ['met', 'met', 'not measured', 'met', 'not measured', 'met']
    assert 'not measured' in gpu.target_table(gpu.judge({}))


def test_a_wrong_value_and_nan_do_not_agree():
    def shifted(draw, n, by): x = draw(n).detach(); return dict(x=x+(by if x.dtype == torch.float32 else 0))
    for by in (1e-2, float('nan')):
        r = gpu.compare(lambda draw, n: shifted(draw, n, by), 'cpu', 50)
        # both float32 computations are wrong here, so only the device's error shows
        assert not r['rows']['x']['device_error'] < 1e-3
    assert 'error' in gpu.compare(lambda draw, n: shifted(draw, n, float('nan')), 'cpu', 50)


def test_cells_under_cuda(tmp_path):
    def notebook(*cells):
        (tmp_path/'made.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[c]) for c in cells])))
        return tmp_path/'made.ipynb'
    head = '#| default_exp metrics', '%matplotlib inline', 'import math\nfrom nowhere_to_be_found import x'
    cell = '#| cuda\ncm = ConfusionMatrix(2)\nopen({!r}, "w").write(str(math.pi))'.format(str(tmp_path/'ran'))
    assert gpu.run_cells(notebook(*head, cell), run=False) == dict(cells=1, run=False) and not (tmp_path/'ran').exists()
    assert gpu.run_cells(notebook(*head, cell)) == dict(cells=1, run=True) and (tmp_path/'ran').exists()
    for run in (True, False):
        with pytest.raises(NameError, match='y'): gpu.run_cells(notebook(*head, 'y = 1', '#| cuda\nprint(y)'), run)
    found = list(gpu.cells_part(SimpleNamespace(notebooks=tmp_path, tiny=False)))
    assert [name for name, _ in found] == ['cells_made'] and 'NameError' in found[0][1]['error']


def test_help_needs_no_torch():
    code = """import sys, sasformer.gpu as g
try: g.main(['check', '--help'])
except SystemExit: pass
assert not {'torch', 'numpy', 'fastai'} & set(sys.modules)"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and '--tiny' in done.stdout, done.stderr


def test_no_gpu_is_said_in_one_line(tmp_path, capsys):
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(SystemExit) as e: gpu.main(['check', '--out', str(tmp_path), '--parts', 'trees'])
    assert e.value.code == 2 and "error: device 'cuda'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_lacking(monkeypatch):
    loaded = set('fastai fastcore numpy torch timm defusedxml ipython pytest'.split())
    monkeypatch.setattr(gpu, 'imported', lambda: loaded)
    names = [r.partition('==')[0] for r in gpu.lacking()]
    assert names == ['defusedxml', 'fastai', 'fastcore']   # required and imported, and not with the machine
    assert [r.partition('==')[0] for r in gpu.lacking(gpu.PRESENT+['fastcore'])] == ['defusedxml', 'fastai']


def test_a_sample_of_voc(data_dir, tmp_path):
    from sasformer.datasets import voc2012
    numbers = gpu.sample_voc(data_dir/'voc2012_subset', tmp_path/'small', mb=1.)
    src = voc2012(tmp_path/'small').check(read=True)
    assert {s: len(ids) for s, ids in src.splits.items()} == numbers and min(numbers.values()) > 1
    assert 'point' in src.released
    assert .7*2**20 < sum(gpu.size_of((tmp_path/'small').rglob(f'*.{kind}')) for kind in ('jpg', 'png')) <= 2**20


def test_too_much_to_travel(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, 'lacking', lambda present: ['fastai==1'])
    def download(requirements, folder): (folder/'fastai-1.whl').write_bytes(bytes(2**20))
    monkeypatch.setattr(gpu, 'download_wheels', download)
    args = ['wheels', '--data', str(data_dir), '--mb', '1', '--out']
    assert gpu.main([*args, str(tmp_path/'fits')]) == 0
    lines = (tmp_path/'fits/README.txt').read_text().splitlines()
    assert '--no-index' in lines[0] and '--find-links' in lines[0] and lines[0].endswith('fastai==1')
    assert 'sasformer.gpu check' in lines[1]
    monkeypatch.setattr(gpu, 'LIMIT', 2**20)
    assert gpu.main([*args, str(tmp_path/'large')]) == 1 and 'too much to travel' in capsys.readouterr().out
