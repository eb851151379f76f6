"""Runs killed at random moments, each resumed, all compared with the uninterrupted one; not part of `make test`:
python tests/kill_runs.py --runs 100 --minutes 10 --out results/kills.json"""
import argparse, hashlib, json, random, shutil, tempfile, time
from pathlib import Path

import torch
from conftest import Forked
from safetensors.torch import load_file
import sasformer.all   # before the first fork: each run takes seconds, and kills meet its work
from sasformer import train
from sasformer.annotations import write_json
from sasformer.machine import environment

ARGS = ('--data scenes:n_train=8,n_val=1,size=48 --annotation scribble --method sasformer --epochs 3 --size 32 --bs 4 '
        '--decoder_dim 16 --device cpu --precision fp32').split()
PICTURES = 'curves.png', 'examples.png'


def program(out, resume=False): return Forked(train.main, [*ARGS, '--out', str(out), *['--resume']*resume])


def moment(out):
    "What a killed run has left"
    if all((out/p).exists() for p in PICTURES): return 'after the pictures'
    if (out/'result.json').exists(): return 'between result and pictures'
    if (out/'state.pt').exists(): return 'after an epoch'
    if (out/'settings.json').exists(): return 'in the first epoch'
    return 'before the first step'


def difference(a, b):
    "Where two runs differ, in words: weights, curves, or files"
    weights = [f'{n}: {k}' for n in ('best', 'last')
               for x, y in [[load_file(f/f'{n}.safetensors') for f in (a, b)]] for k in sorted(x.keys() | y.keys())
               if k not in x or k not in y or not torch.equal(x[k], y[k])]
    curve = lambda f: json.loads((f/'result.json').read_text())['curve']
    curves = [[{k: v for k, v in r.items() if k != 'seconds'} for r in curve(f)] for f in (a, b)]
    files = sorted({f.name for f in a.iterdir()} ^ {f.name for f in b.iterdir()})
    return '; '.join([*(['weights '+', '.join(weights[:3])] if weights else []),
                      *([f'curves {curves[0]} and {curves[1]}'] if curves[0] != curves[1] else []),
                      *(['files '+', '.join(files)] if files else [])])


def kill_and_resume(whole, seconds, folder, g):
    "One run, killed once or several times, then left to end; a word on each kill, and what was wrong"
    kills = []
    for _ in range(g.choice((1, 1, 2))):
        p = program(folder, resume=folder.exists())
        p.process.join(g.uniform(0, seconds))
        p.kill()
        kills.append(moment(folder))
        if kills[-1] == 'after the pictures': break
    if kills[-1] != 'after the pictures':
        p = program(folder, resume=folder.exists())   # killed before it made its folder: it begins
        p.process.join(600)
        if p.poll() != 0: return kills, p.printed.strip().splitlines()[-1]
    return kills, difference(whole, folder)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--runs', type=int, default=100)
    p.add_argument('--minutes', type=float, default=10.)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=Path('results/kills.json'))
    o = p.parse_args()
    torch.set_num_threads(1)
    work, g, began = Path(tempfile.mkdtemp()), random.Random(o.seed), time.time()
    program(work/'whole').finish(900)
    seconds = time.time()-began
    done, wrong, moments = 0, [], {}
    while done < o.runs and time.time()-began < 60*o.minutes:
        kills, fault = kill_and_resume(work/'whole', seconds, work/'run', g)
        done += 1
        for k in kills: moments[k] = moments.get(k, 0)+1
        if fault: wrong.append(dict(run=done, kills=kills, fault=fault))
        print(f'{done}: {", ".join(kills)}{": "*bool(fault)}{fault}', flush=True)
        if fault and (work/'run').exists(): (work/'run').rename(work/f'fault{done}')
        else: shutil.rmtree(work/'run', ignore_errors=True)
    write_json(o.out, dict(runs=done, lost_or_different=len(wrong), faults=wrong, kills=sum(moments.values()),
                           moments=moments, seconds_of_a_run=seconds, seed=o.seed, arguments=' '.join(ARGS),
                           environment=environment()))
    if wrong: print(f'what was left: {work}')
    else: shutil.rmtree(work)


if __name__ == '__main__': main()
