"sasformer_bench: measuring in turn, and every command in small"
import json, mmap
from functools import partial
import numpy as np, pytest, torch
from conftest import Forked, write_folder
from sasformer import measure
from sasformer.bench import bench_parser, main
from sasformer.datasets import scenes
from sasformer.measure import alternate, equal_models, matmul_peak, one_at_a_time, resident_peak, summary
from sasformer.inference import multi_scale_logits


@pytest.fixture(autouse=True)
def same_threads():
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


@pytest.fixture
def quick(monkeypatch):
    "A small matrix product, and memory measured in a process of its own for the first that asks only"
    fresh, seen = measure.fresh_peak, []
    def peak(args):
        if not seen: seen.append(fresh(args))
        return seen[0]+len(seen)
    monkeypatch.setattr(measure, 'fresh_peak', peak)
    monkeypatch.setattr(measure, 'matmul_peak', partial(measure.matmul_peak, n=128))
    return seen


def run(tmp_path, *args):
    out = tmp_path/'result.json'
    main([*map(str, args), '--out', str(out), '--threads', '1'])
    return json.loads(out.read_text())


def test_variants_take_turns():
    calls = []
    times = alternate({n: lambda n=n: calls.append(n) for n in 'abc'}, 3, 1)
    assert len(calls) == 12 and [sorted(calls[i:i+3]) for i in range(0, 12, 3)] == [list('abc')]*4
    assert len({tuple(calls[i:i+3]) for i in range(0, 9, 3)}) == 3   # each order once
    assert {n: len(t) for n, t in times.items()} == dict(a=3, b=3, c=3)


def test_ratio_within_rounds():
    times = dict(base=[(1., 1., {}), (10., 1., {}), (2., 1., {})], double=[(2., 3., {}), (20., 3., {}), (4., 3., {})])
    s = summary(times)
    assert s['double']['ratio'] == 2 and s['double']['cpu_ratio'] == 3 and s['base']['ms'] == 2000


def test_step(tmp_path, quick):
    r = run(tmp_path, 'step', '--size', 64, '--batch', 2, '--classes', 4, '--steps', 2,
            '--variants', 'bare', 'affinity', 'sampled')
    assert list(r['rows']) == ['bare', 'affinity', 'sampled'] and r['settings']['last_stride'] == 1
    for v in r['rows'].values(): assert v['ms'] > 0 and v['peak_mb'] > 100 and v['share_of_peak'] > 0
    assert r['rows']['bare']['ratio'] == 1 and r['environment']['threads'] == 1


def test_loader_and_predict(tmp_path):
    r = run(tmp_path, 'loader', '--images', 16, '--repeats', 1)
    assert all(v['images_per_second'] > 0 for v in r['rows'].values()) and len(r['rows']) == 4
    pytest.importorskip('transformers')
    r = run(tmp_path, 'predict', '--images', 2, '--repeats', 1)
    assert r['equal_pixels'] > .999 and set(r['rows']) == {'transformers', 'ours', 'ours, bf16'}


def test_naive(tmp_path):
    r = run(tmp_path, 'naive', '--size', 64, '--batch', 4, '--steps', 3)
    a, b = (np.array(r['curves'][n]) for n in ('plain', 'ours'))
    assert len(a) == 5 and np.abs(a-b).max() < .1
    assert list(r['rows']) == ['decoder as written', 'plain', 'ours']
    assert np.abs(a-r['curves']['decoder as written']).max() < 1e-3


def test_tree(tmp_path, quick):
    quick.append(500.)   # no process of its own
    r = run(tmp_path, 'tree', '--size', 64, '--batch', 1, '--classes', 3, '--channels', 8,
            '--tree_size', 16, '--tree_batch', 2, '--steps', 1)
    assert r['share_of_step'] > 0 and 'tree energy' in r['rows']


def test_one_at_a_time_is_multi_scale():
    pytest.importorskip('transformers')
    model = equal_models('mit_b0', 3)[0]
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode(): a = one_at_a_time(model, x, (.5, 1.), True).softmax(1)
    torch.testing.assert_close(a, multi_scale_logits(model, x, (.5, 1.), True).softmax(1), atol=1e-5, rtol=0)


def test_peaks():
    assert matmul_peak(n=64) > 1e6
    def grow():
        before, pages = resident_peak(), mmap.mmap(-1, 400*2**20)
        for i in range(0, len(pages), mmap.PAGESIZE): pages[i] = 1
        print(resident_peak()-before)
    assert 370 < float(Forked(grow).finish()) < 450


def test_help(capsys):
    for command in ('step', 'loader', 'predict', 'evaluate', 'naive', 'tree'):
        with pytest.raises(SystemExit) as e: bench_parser().parse_args([command, '--help'])
        assert e.value.code == 0 and '--out' in capsys.readouterr().out


def test_the_programs_keep_freed_memory(monkeypatch, tmp_path):
    "Those that start processes, sasformer_predict, and sasformer_bench unless told not to"
    from sasformer import bench, evaluate, machine, predict, train
    asked = []
    write_folder(scenes(n_train=2, n_val=1, size=32), tmp_path/'set')
    monkeypatch.setattr(machine, 'keep_freed_memory', lambda: asked.append(program))
    program = 'train'
    with pytest.raises(SystemExit):
        train.main(['--data', 'scenes:n_train=2,n_val=1', '--epochs', '1', '--weights', str(tmp_path/'none.pt'),
                    '--out', str(tmp_path/'out')])
    program = 'evaluate'
    with pytest.raises(SystemExit): evaluate.main([str(tmp_path), '--data', 'folder', '--path', str(tmp_path/'set')])
    program = 'predict'
    with pytest.raises(SystemExit): predict.main([str(tmp_path), str(tmp_path), '--out', str(tmp_path/'out')])
    for program, flag in (('bench', []), ('bench without', ['--no-keep_memory'])):
        with pytest.raises(SystemExit):
            bench.main(['loader', '--data', 'camvid', '--path', 'nowhere',
                        '--threads', str(torch.get_num_threads()), *flag])
    assert asked == ['train', 'evaluate', 'predict', 'bench']
