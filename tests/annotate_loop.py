"""From photographs to masks through the page of sasformer_annotate, by a hand that knows the true masks; not part of
`make test`: python tests/annotate_loop.py --path $CAMVID --train '--weights …' --out results/annotate_loop.json"""
import argparse, os, tempfile, time
from pathlib import Path

import numpy as np
from skimage.measure import label
from sasformer.annotate import LabelSet, Predictor, set_classes
from sasformer.annotations import PADDING, centre_line, write_json
from sasformer.benchmarks import camvid
from sasformer.machine import environment
from sasformer.measure import chromium, served, until
from sasformer.metrics import ConfusionMatrix


class Hand:
    "Somebody at the page"
    def __init__(self, page, truth): self.page, self.truth, self.strokes = page, truth, 0

    def at(self, row, col):
        "Where a pixel of the photograph is on the screen"
        box, view = self.page.locator('#stage').bounding_box(), self.page.evaluate('page.stage.view')
        return tuple(box[k]+(v+.5-view[k])*view['scale'] for k, v in (('x', col), ('y', row)))

    def stroke(self, cls, path, corners=12):
        "One brush stroke along a path of pixels"
        self.page.locator('#class-buttons button').nth(cls).click()
        for k, i in enumerate(np.linspace(0, len(path)-1, corners).astype(int)):
            self.page.mouse.move(*self.at(*path[i]))
            if k == 0: self.page.mouse.down()
        self.page.mouse.up()
        self.strokes += 1

    def scribble(self, n, wanted=None, least=.004):
        "In the photograph that is open, a stroke through the largest part of each class, of what is `wanted`"
        mask = self.truth[n]
        for cls in np.unique(mask[mask < PADDING]):
            parts = label((mask == cls) & (True if wanted is None else wanted), connectivity=2)
            areas = np.bincount(parts.ravel())[1:]
            if len(areas) and areas.max() >= least*mask.size:
                self.stroke(int(cls), centre_line(parts == 1+areas.argmax()))
        until(self.page, '!page.saver.busy && !page.saver.queue.length')

    def open(self, n):
        self.page.locator('#list button').nth(n).click()
        self.page.wait_for_selector(f'#stage[data-ready="{n}"]')

    def train(self, method, steps):
        "A new run to its end; its seconds"
        began = time.time()
        self.page.select_option('#method', method)
        self.page.fill('#steps', str(steps))
        self.page.click('#train')
        until(self.page, "page.training.status === 'running'")
        until(self.page, "page.training.status !== 'running'", 3600)
        said = self.page.locator('#train-said').text_content()
        if self.page.evaluate('page.training.status') != 'finished': raise RuntimeError(f'the training: {said}')
        return time.time()-began

    def next(self):
        "The photograph that the page offers"
        before = self.page.evaluate('page.n')
        self.page.click('#next')
        until(self.page, f"page.n !== {before} && document.getElementById('stage').dataset.ready == page.n")
        return self.page.evaluate('page.n')


def predicted(maps, numbers):
    "Masks of the newest model"
    model = Predictor(maps)
    return {n: model.mask(maps.ids[n]) for n in numbers}


def miou(masks, truth, numbers, n_classes):
    matrix = ConfusionMatrix(n_classes)
    for n in numbers: matrix.update(masks[n][None], truth[n][None])
    return float(matrix.miou)


def loop(o, root, src):
    "The whole way; what `results/annotate_loop.json` holds"
    ids = [i for s in ('train', 'val') for i in src.splits[s]]
    chosen = sorted(np.random.default_rng(o.seed).choice(ids, o.photos+o.rest, replace=False))
    (root/'images').mkdir()
    for i in chosen: src.image(i).save(root/'images'/f'{i}.png')
    maps = LabelSet(root, set_classes(root, src.classes))
    truth, n_classes, seconds = [src.mask(i) for i in maps.ids], len(src.classes), {}
    with chromium() as browser, served(root, o.train) as link, browser.new_page() as page:
        page.set_default_timeout(300_000)
        page.goto(link)
        page.wait_for_selector('#stage[data-ready="0"]')
        hand, began = Hand(page, truth), time.time()
        first = [*range(o.photos)]
        for n in first:
            hand.open(n)
            hand.scribble(n)
        seconds['scribbles'], strokes = time.time()-began, hand.strokes
        seconds['training'] = hand.train(o.method, o.steps)
        rest = [n for n in range(len(chosen)) if n not in first]
        before = predicted(maps, rest)
        until(page, f'page.training.looked_at >= {len(rest)}', 3600)
        began, corrected = time.time(), []
        for _ in range(o.corrections):
            corrected.append(n := hand.next())
            hand.scribble(n, before[n] != truth[n])
        seconds['corrections'] = time.time()-began
        seconds['training again'] = hand.train(o.method, o.steps)
    rest = [n for n in rest if n not in corrected]
    after = predicted(maps, rest)
    return dict(miou_before=miou(before, truth, rest, n_classes), miou_after=miou(after, truth, rest, n_classes),
                measured_on=len(rest), strokes=strokes, strokes_of_corrections=hand.strokes-strokes, seconds=seconds,
                corrected=[maps.ids[n] for n in corrected])


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--path', type=Path, required=True, help="CamVid's folder")
    p.add_argument('--photos', type=int, default=12, help="Photographs that are scribbled on")
    p.add_argument('--rest', type=int, default=100, help="Photographs without a label")
    p.add_argument('--corrections', type=int, default=6, help="Offered by the page and corrected")
    p.add_argument('--steps', type=int, default=400, help="Of each of the two trainings")
    p.add_argument('--method', default='sasformer', help="baseline, sasformer, tel, sasformer+tel")
    p.add_argument('--train', default='--size 192 --bs 8', help="More options of sasformer_train")
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=Path('results/annotate_loop.json'))
    o = p.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as tmp: result = loop(o, Path(tmp), camvid(o.path))
    settings = {k: v for k, v in vars(o).items() if k not in ('path', 'out')}
    result = dict(settings=settings, **result, load_average=[*load, *os.getloadavg()], environment=environment())
    write_json(o.out, result)
    print(result)


if __name__ == '__main__': main()
