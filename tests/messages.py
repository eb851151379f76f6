"""Twenty things that go wrong, really provoked, and what is said: `python tests/messages.py [FOLDER]`

Each message has to say by itself which file or option it is about, which value is wrong, and what to do now."""
import contextlib, io, os, shlex, shutil, tempfile, warnings
from pathlib import Path
import numpy as np
from PIL import Image

DENSE = 'sasformer_train --data folder --path photos --annotation dense'
TINY = ('--size 32 --bs 2 --epochs 1 --method baseline --model segformer_test_resnet --decoder_dim 16 --device cpu '
        '--precision fp32')
COMMANDS = [   # the name of a change to a whole folder of photographs, and a command in its home
    ('', 'sasformer_train --data foldr --path photos'),
    ('', 'sasformer_train --data folder'),
    ('', 'sasformer_train --data folder --path photso'),
    ('no_names', f'sasformer_train --data folder --path photos {TINY}'),
    ('zero_and_255', f'{DENSE} {TINY}'),
    ('beyond', f'{DENSE} {TINY}'),
    ('another_size', f'{DENSE} {TINY}'),
    ('cut', f'{DENSE} {TINY}'),
    ('coloured', f'{DENSE} {TINY}'),
    ('bands', f'sasformer_train --data folder:channels=4 --path photos --annotation dense {TINY}'),
    ('', f'sasformer_train --data folder --path photos --annotation scribble:widht=3 {TINY}'),
    ('', f'{DENSE} {TINY} --model segformer_mit_b9'),
    ('', f'{DENSE} {TINY} --model segformer_beit_base_patch16_224'),
    ('', f'{DENSE} {TINY} --lr nan'),
    ('', f'{DENSE} {TINY} --bs 1'),
    ('', f'{DENSE} {TINY} --device cuda:7'),
    ('trained', f'{DENSE} {TINY} --out run'),
    ('trained', f'{DENSE} {TINY} --lr 0.5 --out run --resume'),
    ('renamed', 'sasformer_eval run --path photos --device cpu'),
    ('', 'sasformer_eval photos'),
    ('bands', 'sasformer_predict run photos/images --out out --device cpu'),
    ('trained', 'sasformer_predict run photos/images --out photos/images --device cpu'),
    ('written', 'sasformer_predict run photos/images --out out --device cpu'),
    ('large', 'sasformer_predict run photos/images --out out --max_megapixels 0.0001 --device cpu'),
]


def whole(home):
    for d in ('images', 'masks'): (home/'photos'/d).mkdir(parents=True)
    for i in 'abcdefghij':
        Image.new('RGB', (40, 32), (90, 90, 60)).save(home/f'photos/images/{i}.jpg')
        paint(home, i, np.tile(np.uint8([0, 1]), (32, 20)))
    (home/'photos/codes.txt').write_text('sky\ngrass\n')

def paint(home, i, a): Image.fromarray(a).save(home/f'photos/masks/{i}.png')

def spoil(home, how, run):
    if how in ('trained', 'renamed', 'bands', 'written', 'large'): shutil.copytree(run, home/'run')
    if how == 'no_names': (home/'photos/codes.txt').unlink()
    if how == 'zero_and_255':
        for i in 'abcdefghij': paint(home, i, np.tile(np.uint8([0, 255]), (32, 20)))
    if how == 'beyond': paint(home, 'c', np.full((32, 40), 7, np.uint8))
    if how == 'another_size': paint(home, 'c', np.zeros((40, 32), np.uint8))
    if how == 'cut': (home/'photos/images/c.jpg').write_bytes((home/'photos/images/c.jpg').read_bytes()[:300])
    if how == 'coloured': paint(home, 'c', np.tile(np.uint8([(0, 0, 0), (255, 0, 0)]), (32, 20, 1)))
    if how == 'renamed': (home/'photos/codes.txt').write_text('sky\nmeadow\n')
    if how == 'written':
        (home/'out').mkdir()
        Image.new('L', (40, 32)).save(home/'out/a.png')
    if how == 'bands':
        import tifffile
        for f in list((home/'photos/images').iterdir()):
            tifffile.imwrite(f.with_suffix('.tif'), np.random.default_rng(0).integers(0, 9, (32, 40, 5), np.uint8),
                             planarconfig='contig')
            f.unlink()

def said(command):
    "What a command prints as an error, and its exit code"
    from sasformer import evaluate, predict, train
    name, *args = shlex.split(command)
    main = dict(sasformer_train=train.main, sasformer_eval=evaluate.main, sasformer_predict=predict.main)[name]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main(args)
        except SystemExit as e: code = e.code
    return err.getvalue().strip(), code

def messages(home):
    "(command, message, exit code) of each of `COMMANDS`"
    before, limit = os.getcwd(), Image.MAX_IMAGE_PIXELS
    try:
        whole(home/'first')
        os.chdir(home/'first')
        text, code = said(f'{DENSE} {TINY} --out run')
        assert code == 0, text
        for k, (how, command) in enumerate(COMMANDS):
            there = home/str(k)
            whole(there)
            spoil(there, how, home/'first/run')
            os.chdir(there)
            text, code = said(command)
            Image.MAX_IMAGE_PIXELS = limit
            yield command, text.replace(f'{there}/', ''), code
    finally: os.chdir(before)

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as d:
        for command, text, code in messages(Path(d)):
            print(f'$ {command.replace(TINY, "…")}\n{text}\n(exit {code})\n', flush=True)
