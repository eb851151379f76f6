"The registry of experiments and its program: what is run, what is skipped, what is refused, and what is shown"
import argparse, fcntl, json, subprocess, sys, types
from pathlib import Path
import pytest
from conftest import Forked, fork_two
from sasformer import paper
from sasformer.annotations import write_label_map
from sasformer.datasets import scenes
from sasformer.paper import (BASES, PUBLISHED, TABLES, cell_recipe, differences, main, paper_table, run_cells,
                             table_cells, table_folder, table_rows)


def fake_result(cell, miou=.5):
    r = cell_recipe(cell)
    return dict(settings=r.settings(), miou=miou, seconds=1., iou={'a': miou}, curve=[], machine='none', commit='none')


def write(folder, cells, miou=lambda name: .5):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for n, c in cells.items(): (Path(folder)/f'{n}.json').write_text(json.dumps(fake_result(c, miou(n))))


@pytest.fixture
def instant(monkeypatch):
    "Cells that end as soon as they start; the list of those that were started"
    started = []
    def start(cell, out, *args):
        started.append(out.name)
        out.mkdir(parents=True)
        if code := int(out.name == 'fails'): (out/'output.txt').write_text('out of memory')
        else: (out/'result.json').write_text(json.dumps(fake_result(cell)))
        return types.SimpleNamespace(poll=lambda: code, returncode=code)
    monkeypatch.setattr(paper, '_start', start)
    return started


def fails(args, capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and 'Traceback' not in err and err.startswith('sasformer_paper: error: '), err
    for w in words: assert str(w) in err, err


# The registry

@pytest.mark.parametrize('size', BASES)
@pytest.mark.parametrize('table', TABLES)
def test_every_cell_is_a_recipe(table, size):
    if TABLES[table].folder and size != 'mini': return
    for name, cell in table_cells(table, size).items():
        r = cell_recipe(cell)
        assert r.seed == cell['seed'] and not set('/:, ') & set(name), name


@pytest.mark.parametrize('size', BASES)
def test_a_name_has_one_meaning_and_a_meaning_one_name(size):
    fields, names = {}, {}
    for t in (t for t in TABLES if not TABLES[t].folder):
        for name, cell in table_rows(t, size).values():
            assert fields.setdefault(name, cell) == cell, name
            r = cell_recipe(cell)
            meaning = r.settings() | dict(options={n: {**m.meaning(), 'form': None} for n, m in r.methods.items()})
            key = repr(sorted(meaning.items()))
            assert names.setdefault(key, name) == name, (names[key], name)


def test_shared_cells():
    tables = [set(table_cells(t)) for t in ('table2', 'table3', 'table4', 'table5')]
    assert {f'scribble-sasformer-seed{s}' for s in range(3)} == set.intersection(*tables)
    assert len(set.union(*tables)) == 3*(3+6+4+3)
    for n, c in table_cells('tel').items():   # those of CamVid's own table have the same names and fields
        assert table_cells('camvid').get(n, c) == c
    assert 'points-sasformer-seed0' in set(table_cells('tel')) & set(table_cells('camvid'))


def test_full_is_the_papers_setting():
    r = cell_recipe(table_cells('table1', 'full')['point-sasformer-seed0'])
    assert (r.data, r.model, r.annotation) == ('voc2012', 'segformer_mit_b4', 'point')
    assert (r.size, r.bs, r.iterations, r.methods['sasformer'].alpha) == (512, 16, 80_000, .2)
    assert cell_recipe(table_cells('table2', 'full')['scribble-sasformer-seed0']).methods['sasformer'].alpha == 1.2
    assert list(table_cells('table2', 'full')) == list(table_cells('table2', 'full', 1))


def test_result_files_of_the_project_belong_to_cells():
    root = Path(__file__).parents[1]/'results'
    known = {(table_folder(t, s), n)
             for t in TABLES for s in BASES if s == 'mini' or not TABLES[t].folder
             for n in table_cells(t, s, 9)}
    folders = {f for f, _ in known}
    files = [f for f in root.glob('*/*-seed*.json') if f.parent.name in folders]
    assert files and not [f.name for f in files if (f.parent.name, f.stem) not in known]


def test_published_numbers(data_dir):
    p = json.loads((data_dir/'paper_results.json').read_text())
    def name(m, b, multi):
        if b == 'SegFormer-B4': return {'Baseline': 'baseline'}.get(m, m)
        return f"{m} ({b}{', multi-stage' if multi else ''})"
    for t, k in (('table1', 'table1_point'), ('table2', 'table2_scribble')):
        assert PUBLISHED[t] == {name(*r[:3]): r[3] for r in p[k]}
    named = {'': 'none', '1+2+3+4': 'all'}
    assert PUBLISHED['table3'] == {named.get(k, k): v for k, v in p['table3_blocks_scribble'].items()}
    pairs = p['table4_backbones_scribble']
    assert PUBLISHED['table4'] == {f'{m} {w}': v for m, d in pairs.items() for w, v in d.items()}
    assert PUBLISHED['table5'] == p['table5_distances_scribble_as_printed']
    assert PUBLISHED['afa'] == {"MiT-B1, image tags": next(r[3] for r in p['afa_readme'] if r[1] == 'VOC2012 val')}
    for t in ('table1', 'table2', 'table3', 'table4', 'table5'): assert set(TABLES[t].rows) <= set(PUBLISHED[t])


# Running

def test_runs_what_is_missing_once(instant, tmp_path, capsys):
    "Shared cells once; those with a result not at all; seed 0 of all before seed 1"
    results = tmp_path/'results'
    write(results/'mini', {n: c for n, c in table_cells('table3').items() if n.startswith('scribble-baseline')})
    args = ['run', 'table3', 'table5', '--results', str(results), '--work', str(tmp_path/'work'), '--jobs', '3']
    main(args)
    assert len(instant) == len(set(instant)) == 3*(7+3) and 'scribble-baseline-seed0' not in instant
    assert '30 run, 3 were there' in capsys.readouterr().out
    assert [n[-1] for n in instant[:21]] == ['0']*7+['1']*7+['2']*7
    main(args)
    assert len(instant) == 30 and '0 run, 33 were there' in capsys.readouterr().out


def test_only_by_whole_names_and_parts():
    only = lambda names: list(paper._chosen(types.SimpleNamespace(size='mini', only=names), 'acdc', 1))
    assert only('tel-seed0') == ['tel-seed0'] and only('tel') == ['tel-seed0', 'sasformer_tel-seed0']
    assert only('tel-seed0, released') == ['tel-seed0', 'released-seed0']

def test_only_and_seeds(instant, tmp_path, capsys):
    places = ['--results', tmp_path/'results', '--work', tmp_path/'work']
    main([str(a) for a in ['run', 'table3', '--only', 'blocks=1+2-,baseline', '--seeds', 2, *places]])
    variants = 'baseline', 'sasformer-blocks=1+2'
    assert sorted(instant) == sorted(f'scribble-{v}-seed{s}' for v in variants for s in (0, 1))
    fails(['run', 'table3', '--only', 'block9', *places], capsys, 'block9')
    fails(['run', 'table9', *places], capsys, 'table9', 'table1')
    fails(['run', 'camvid', *places], capsys, '--weights')
    fails(['run', 'table3', '--jobs', 0, *places], capsys, 'jobs=0')
    fails(['run', 'scenes', '--size', 'full', *places], capsys, 'full')
    fails(['list', 'table2', '--size', 'huge', *places], capsys, '--size')


def test_other_settings_are_refused(instant, tmp_path, capsys):
    cells = table_cells('table5', seeds=1)
    write(tmp_path/'results'/'mini', {n: {**c, 'lr': .5} for n, c in cells.items() if 'L2' in n})
    before = (tmp_path/'results'/'mini'/'scribble-sasformer-distance=L2-seed0.json').read_bytes()
    places = ['--results', tmp_path/'results', '--work', tmp_path/'work']
    fails(['run', 'table5', *places], capsys, 'distance=L2-seed0.json', 'lr 0.5')
    assert not instant
    assert (tmp_path/'results'/'mini'/'scribble-sasformer-distance=L2-seed0.json').read_bytes() == before
    main([str(a) for a in ['list', 'table5', *places]])
    assert 'other settings: lr 0.5' in capsys.readouterr().out
    df = paper_table('table5', tmp_path/'results')
    assert df.seeds.sum() == 0 and len(df.attrs['stale']) == 1


def test_a_failing_cell_keeps_no_other_from_running(instant, tmp_path):
    base = dict(recipe='scenes', method='baseline')
    cells = dict(a=base, fails=dict(base, seed=1), c=dict(base, seed=2))
    with pytest.raises(RuntimeError, match='fails failed.*\nout of memory'):
        run_cells(cells, tmp_path/'results', tmp_path/'work')
    assert sorted(f.stem for f in (tmp_path/'results').iterdir()) == ['a', 'c']


def test_a_cell_that_another_process_runs(tmp_path):
    (tmp_path/'work'/'a').mkdir(parents=True)
    with open(tmp_path/'work'/'a'/'lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        seen = []
        cells = dict(a=dict(recipe='scenes'))
        assert run_cells(cells, tmp_path/'results', tmp_path/'work', done=lambda *a: seen.append(a)) == []
    assert seen == [('a', None)] and not (tmp_path/'work'/'a'/'cell.json').exists()


def test_command_of_a_cell(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(subprocess, 'Popen', lambda c, **kw: commands.append((c, kw['env'].get('OMP_NUM_THREADS'))))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    cell = table_cells('table4', 'full')['scribble-sasformer-segmenter_vit_base_patch16_384-weights=timm-seed0']
    paper._start(cell, tmp_path/'a', 'VOC', None, None, 'torchrun --nproc_per_node 4')
    command = ['torchrun', '--nproc_per_node', '4', '-m', 'sasformer.paper', 'cell', str(tmp_path/'a')]
    assert commands == [(command, None)]
    r = json.loads((tmp_path/'a'/'cell.json').read_text())
    assert r['path'] == 'VOC' and r['last_stride'] is None and r['weights'] == 'timm'
    cell = {**table_cells('camvid')['points-baseline-seed0']}
    paper._start(cell, tmp_path/'b', 'CamVid', 'b0.safetensors', 'cpu', None)
    assert commands[1][0][0] == sys.executable
    assert commands[1][1] == '1'
    assert json.loads((tmp_path/'b'/'cell.json').read_text())['weights'] == 'b0.safetensors'


@pytest.fixture
def home(tmp_path):
    src = scenes(n_train=8, n_val=4, size=64)
    for split, ids in src.splits.items():
        for d in ('images', 'masks'): (tmp_path/'set'/d/split).mkdir(parents=True)
        for i in ids:
            src.image(i).save(tmp_path/'set'/'images'/split/f'{i}.png')
            write_label_map(tmp_path/'set'/'masks'/split/f'{i}.png', src.mask(i), src.palette)
    (tmp_path/'set'/'codes.txt').write_text('\n'.join(src.classes))
    return tmp_path/'set'


class ForkedCells:
    "A command of cells in forks of this process, as many as its launcher says"
    def __init__(self, command, env=None, **kwargs):
        *launcher, _, module, cell, out = command
        assert (module, cell) == ('sasformer.paper', 'cell')
        run = main, [cell, out]
        self.forks = fork_two(*run) if launcher == ['two'] else [Forked(*run)]

    @property
    def returncode(self): return next((f.poll() for f in self.forks if f.poll() != 0), 0)
    def poll(self): return None if any(f.poll() is None for f in self.forks) else self.returncode
    def terminate(self): [f.process.terminate() for f in self.forks]
    def wait(self): [f.process.join() for f in self.forks]


def test_stopped_and_continued_in_two_processes(home, tmp_path, monkeypatch):
    "A cell that is stopped after its first epoch goes on by the same call, here under a launcher, to the last epoch"
    monkeypatch.setattr(paper, 'subprocess', types.SimpleNamespace(Popen=ForkedCells, STDOUT=None))
    cells = dict(a=dict(recipe='folder', method='sasformer', epochs=3, size=64, bs=4, decoder_dim=32,
                        validate_every=1, precision='fp32'))
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    run = lambda **kw: run_cells(cells, tmp_path/'results', tmp_path/'work', home, **{'device': None, **kw})
    state, sleep = tmp_path/'work'/'a'/'state.pt', paper.time.sleep
    def stop(seconds):
        sleep(.02)
        if state.exists(): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(paper.time, 'sleep', stop)
        run()
    assert not (tmp_path/'results').exists()
    assert run(launcher='two') == ['a']
    assert run() == []
    r = json.loads((tmp_path/'results'/'a.json').read_text())
    assert r['processes'] == 2
    assert [row['epoch'] for row in r['curve']] == [1, 2, 3]
    assert not differences(r['settings'], cells['a'])


# Showing

def test_show(tmp_path, capsys):
    values = {'baseline': (.40, .42, .44), 'sasformer': (.60, .61, .62)}
    cells = table_cells('table2')
    for s in range(3):
        of_seed = {n: c for n, c in cells.items() if n.endswith(str(s)) and 'tel' not in n}
        write(tmp_path/'mini', of_seed, lambda n: values[n.split('-')[1]][s])
    df = paper_table('table2', tmp_path)
    assert df.loc['SASFormer', ['seeds', 'mIoU', 'spread', 'published']].tolist() == pytest.approx([3, 61, 2, 79.49])
    assert df.loc['baseline', 'spread'] == pytest.approx(4)
    assert df.loc['TEL', 'seeds'] == 0
    assert df.attrs['missing'] == ['TEL']
    assert paper.same_order(df) == dict(pairs=1, same=1, clear=1, clear_same=1)
    main(['show', 'table2', 'scenes', '--results', str(tmp_path)])
    out = capsys.readouterr().out
    for w in ('61.00', '79.49', 'URSS', 'not run: TEL', '1 of 1 pairs', TABLES['scenes'].title): assert w in out


def test_list(tmp_path, capsys):
    write(tmp_path/'results'/'scenes', {n: c for n, c in table_cells('scenes').items() if n == 'baseline-seed1'})
    (tmp_path/'work'/'scenes'/'baseline-seed0').mkdir(parents=True)
    (tmp_path/'work'/'scenes'/'baseline-seed0'/'state.pt').write_text('')
    places = ['--results', str(tmp_path/'results'), '--work', str(tmp_path/'work')]
    main(['list', 'scenes', *places])
    states = {name: state for state, name in (l.split() for l in capsys.readouterr().out.splitlines())}
    assert (states['baseline-seed0'], states['sasformer-seed0'], states['baseline-seed1']) == ('begun', '-', 'done')
    assert list(states) == list(table_cells('scenes'))
    main(['list', *places])
    out = capsys.readouterr().out
    for t in TABLES: assert t in out
    main(['list', '--size', 'full', *places])
    assert 'camvid' not in capsys.readouterr().out


def test_every_argument_is_documented():
    p = paper.paper_parser()
    subs = next(a for a in p._actions if isinstance(a, argparse._SubParsersAction)).choices
    for s in subs.values():
        for a in s._actions: assert a.help and a.help is not argparse.SUPPRESS, (s.prog, a.dest)
        s.format_help()


def test_result_files_of_earlier_versions_are_those_of_their_cells():
    "A field that a recipe has since got counts as its default, whatever its type"
    checked = 0
    for table in ('camvid', 'scenes'):
        for name, cell in paper.table_rows(table).values():
            file = Path(__file__).parents[1]/'results'/table/f'{name}-seed0.json'
            if not file.exists(): continue
            settings = json.loads(file.read_text())['settings']
            assert paper.differences(settings, {**cell, 'seed': 0}) == '', file
            checked += 1
    assert checked > 5
