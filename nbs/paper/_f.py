import faulthandler; faulthandler.dump_traceback_later(100, exit=True)
# ---
# jupyter:
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The paper's figures
#
# > Predictions, the framework, attention from a starred point, a qualitative sheet, training curves
#
# Figures 1 to 4 of the paper and the curves of `AffinityLoss` by block, from trained runs of `sasformer_paper run` (their folders in
# `runs/`, not committed). Where no runs are found, a pair is trained for two epochs just now: it draws every figure, and shows little.

# %%
#| hide
import sasformer   # first: it silences a warning that torch gives when fastai and timm are imported

# %%
import json, os, torch
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np
from matplotlib.patches import FancyArrowPatch
from fastcore.test import *
from sasformer.attention import AttentionTap, attention_from, attention_map
from sasformer.data import blend, class_legend, colour_labels
from sasformer.datasets import scenes
from sasformer.inference import image_tensor, predict_image, predict_logits
from sasformer.learner import load_segmenter
from sasformer.metrics import ConfusionMatrix
from sasformer.paper import read_results
from sasformer.recipes import Recipe, recipe

results = Path(os.environ.get('SASFORMER_RESULTS', '../../results'))
runs = Path(os.environ.get('SASFORMER_RUNS', '../../runs'))
data = os.environ.get('SASFORMER_DATA') or ('../../../shared/data' if Path('../../../shared/data').exists() else None)
plt.style.use('seaborn-v0_8-colorblind')

# %% [markdown]
# For print: with `SASFORMER_FIGURES` set to a folder, every figure is also written there, as PDF (lines and text stay vectors) and as PNG
# with 200 dots per inch.

# %%
def save(fig, name):
    "Write a figure for print where a folder is given"
    if not (folder := os.environ.get('SASFORMER_FIGURES')): return
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind in ('pdf', 'png'): fig.savefig(Path(folder)/f'{name}.{kind}', dpi=200, bbox_inches='tight')

# %% [markdown]
# ## The pairs
#
# A pair is a baseline and a SASFormer with the same data, labels, schedule and seed.

# %%
def load_pair(baseline, ours):
    "Source, labels and both models of two run folders; `None` where one of them or its data is not here"
    folders = [runs/baseline, runs/ours]
    if not all((f/'last.safetensors').exists() for f in folders): return None
    s = json.loads((folders[1]/'settings.json').read_text())['recipe']
    if s['data']=='camvid' and data is None: return None
    src = Recipe(data=s['data'], path=f'{data}/camvid' if s['data']=='camvid' else None, epochs=1).source()
    return src, s['annotation'], {n: load_segmenter(f/'last.safetensors') for n,f in zip(('baseline','SASFormer'), folders)}

def tiny_pair():
    "Two models that were trained for two epochs on 16 small scenes"
    src, models = scenes(n_train=16, n_val=8, size=64), {}
    for name in ('baseline','SASFormer'):
        r = recipe('scenes', epochs=2, size=64, method=name.lower(), start=0., validate_every=2, precision='fp32')
        learn = r.learner(src, device=torch.device('cpu'))
        with learn.no_bar(), learn.no_logging(): r.run(learn)
        models[name] = learn.model.eval()
    return src, r.annotation, models

# %%
names = dict(scenes=['mini/point-{}-seed0', 'scenes/{}-seed0', 'scenes_scribble/{}-seed0'], photographs=['camvid/points-{}-seed0', 'camvid/short-{}-seed0'])
pairs = {k: next((p for f in fs if (p := load_pair(f.format('baseline'), f.format('sasformer')))), None) for k,fs in names.items()}
pairs = {k: p for k,p in pairs.items() if p}
if not pairs:
    import contextlib, io
    with contextlib.redirect_stdout(io.StringIO()): pairs = {'scenes': tiny_pair()}
    print("no runs here: a pair that was trained for two epochs")
for k,(src,labels,_) in pairs.items(): print(f"{k}: {src.name} from {labels} labels")

# %% [markdown]
# ## Figure 1: image, sparse label, baseline, ours
#
# Validation images with the labels that such an image would have in training, and what both models say.

# %%
def thick(labels):
    "Labels drawn wider, to be seen on a small picture"
    out, by = labels.copy(), max(1, labels.shape[1]//120)
    for dy in range(-by, by+1):
        for dx in range(-by, by+1): out = np.where(out<254, out, np.roll(labels, (dy,dx), (0,1)))
    return out

def predictions(pair, ids):
    "Rows of pictures: image, labels over the image, each model's prediction, mask"
    src, spec, models = pair
    image = lambda i: np.asarray(src.image(i))
    return [[image(i), blend(image(i), thick(src.annotation(i, spec)), src.palette, 1.), *(predict_image(m, src.image(i)) for m in models.values()), src.mask(i)] for i in ids]

def draw_rows(rows, titles, src, width=1.75):
    "A sheet of pictures and label maps, with a legend of the classes that occur"
    h, w = rows[0][0].shape[:2]
    fig, axs = plt.subplots(len(rows), len(titles), figsize=(width*len(titles), width*h/w*len(rows)+.3), dpi=80, squeeze=False, layout='constrained')
    for axr,row in zip(axs, rows):
        for ax,a in zip(axr, row): ax.imshow(colour_labels(a, src.palette) if a.ndim==2 else a, interpolation='nearest'); ax.set(xticks=[], yticks=[])
    for ax,t in zip(axs[0], titles): ax.set_title(t, fontsize=9)
    class_legend(fig, sorted({int(c) for r in rows for a in r if a.ndim==2 for c in np.unique(a) if c<len(src.classes)}), src.classes, src.palette, fontsize=8)
    return fig

# %%
titles = ['image', 'sparse label', 'baseline', 'SASFormer', 'mask']
for k,pair in pairs.items():
    ids = pair[0].splits['val']
    fig = draw_rows(predictions(pair, [ids[i] for i in (len(ids)//4, len(ids)//2)]), titles, pair[0])
    save(fig, f'figure1_{k}'); plt.show()

# %% [markdown]
# ## Figure 2: the framework
#
# Drawn from one forward pass: every shape in it is that of a tensor which the model really made. The propagation of a block multiplies its
# map $A_l$ with the prediction at the size of its keys, and the result is compared with the prediction at the size of its queries.

# %%
def trace(pair, id):
    "What one forward pass makes: features, maps, prediction"
    src, spec, models = pair
    model, x = models['SASFormer'], image_tensor(src.image(id))
    feats = []
    handle = model.decoder.register_forward_pre_hook(lambda m, args: feats.extend(args[0]))
    with AttentionTap(model) as tap, torch.no_grad(): logits = model(x)
    handle.remove()
    blocks = {b+1: dict(M=l[0].q_size, Mk=l[0].k_size, layers=len(l), heads=l[0].q.shape[1], A=attention_map(l)[0]) for b,l in tap.blocks.items()}
    return dict(image=np.asarray(src.image(id)), labels=src.annotation(id, spec), features=[tuple(f.shape[1:]) for f in feats], blocks=blocks, logits=logits[0])

def propagated(t, b):
    "P' and Y = A P' of a block, as label maps, and P at the size of Y"
    o = t['blocks'][b]
    p = lambda size: torch.nn.functional.interpolate(t['logits'][None], size, mode='bilinear', align_corners=False)[0].softmax(0)
    y = (o['A'] @ p(o['Mk']).flatten(1).T).T.unflatten(1, o['M'])
    return [z.argmax(0).byte().numpy() for z in (p(o['Mk']), y, p(o['M']))]

pair = pairs.get('photographs') or pairs['scenes']
t = trace(pair, pair[0].splits['val'][0])
for b,o in t['blocks'].items(): test_close(o['A'].sum(-1), torch.ones(o['A'].shape[0]), 1e-4)
test_eq(len(t['features']), len(t['blocks']))

# %%
def picture(fig, box, a, title, palette, **kw):
    "A picture at `box` (left, bottom, width, height), as shares of the figure"
    ax = fig.add_axes(box); ax.set(xticks=[], yticks=[]); ax.set_title(title, fontsize=7, pad=2)
    ax.imshow(colour_labels(a, palette) if a.ndim==2 and a.dtype==np.uint8 else a, aspect='auto', interpolation='nearest', **kw)

def arrow(fig, start, end, label='', **kw):
    fig.patches.append(FancyArrowPatch(start, end, transform=fig.transFigure, arrowstyle='-|>', mutation_scale=9, color='0.3', lw=1, **kw))
    if label: fig.text((start[0]+end[0])/2, (start[1]+end[1])/2+.008, label, ha='center', fontsize=7)

by = lambda size: '×'.join(map(str, size))

def draw_framework(t, palette):
    fig = plt.figure(figsize=(9.5, 6.8), dpi=80)
    picture(fig, (.02, .74, .14, .17), t['image'], f"image 3×{by(t['image'].shape[:2])}", palette)
    for n,s in enumerate(t['features']):
        left, high = .215+.125*n, .17*(.8**n)
        fig.add_artist(plt.Rectangle((left, .825-high/2), .09, high, transform=fig.transFigure, facecolor=f'C{n}', alpha=.35, edgecolor='k', lw=.8))
        fig.text(left+.045, .825, f"block {n+1}\n{by(s)}", ha='center', va='center', fontsize=7)
        arrow(fig, (left-(.05 if not n else .035), .825), (left, .825))
    picture(fig, (.78, .74, .1, .17), t['logits'].argmax(0).byte().numpy(), f"P {by(t['logits'].shape)}", palette)
    arrow(fig, (.68, .825), (.775, .825), 'decoder')
    picture(fig, (.89, .74, .1, .17), thick(t['labels']), 'sparse label', palette)
    fig.text(.885, .705, r'$L_{seg}$: partial cross-entropy', ha='center', fontsize=8)
    for n,b in enumerate(t['blocks']): draw_propagation(fig, t, b, .54-.145*n, palette)
    fig.text(.5, .02, r'$L = L_{seg} + \alpha\ \mathrm{mean}_l\ \|\mathrm{softmax}(Y_l) - \mathrm{softmax}(P_l)\|_1$', ha='center', fontsize=10)
    return fig

def draw_propagation(fig, t, b, bottom, palette):
    "One row: the map, the prediction at key resolution, what it propagates to, the prediction at query resolution"
    o, (small, y, p) = t['blocks'][b], propagated(t, b)
    A = torch.nn.functional.adaptive_avg_pool2d(o['A'][None], (min(96, o['A'].shape[0]), min(96, o['A'].shape[1])))[0]
    fig.text(.02, bottom+.05, f"block {b}\n{o['layers']} layers × {o['heads']} head{'s' if o['heads']>1 else ''}", fontsize=8, va='center')
    for left,w,a,title in ((.2,.16,A.numpy(),f"$A_{b}$  {by(o['A'].shape)}"), (.42,.11,small,f"$P'_{b}$  {by(o['Mk'])}"), (.61,.11,y,f"$Y_{b}$  {by(o['M'])}"), (.83,.11,p,f"$P_{b}$  {by(o['M'])}")):
        picture(fig, (left, bottom, w, .105), a, title, palette, **(dict(cmap='viridis') if a.dtype!=np.uint8 else {}))
    for x,s in ((.39,'×'), (.57,'='), (.775, r'$\leftrightarrow\ L_{aff}^{%d}$' % b)): fig.text(x, bottom+.045, s, ha='center', fontsize=11)

fig = draw_framework(t, pair[0].palette)
save(fig, 'figure2'); plt.show()

# %% [markdown]
# ## Figure 3: attention from one point
#
# Row $i$ of $A_1 … A_4$ for the point with the star, in the baseline and in SASFormer: the same point, and the same scale for both in
# each block. A weight of 1 is what a uniform attention would give.

# %%
def draw_attention(pair, id, row, column):
    "A_1 … A_4 from a point (shares of height and width), a row of pictures for each model"
    src, _, models = pair
    image, maps = np.asarray(src.image(id)), {}
    for name,m in models.items():
        with AttentionTap(m) as tap, torch.no_grad(): m(image_tensor(image))
        maps[name] = [(a := attention_from(l, row, column)[0].numpy())*a.size for l in tap.blocks.values()]
    h, w = image.shape[:2]
    n = len(maps['baseline'])
    fig, axs = plt.subplots(len(models), n+1, figsize=(1.65*(n+1)+.4, 1.65*h/w*len(models)+.6), dpi=80, squeeze=False, layout='constrained')
    for r,(axr,(name,ms)) in enumerate(zip(axs, maps.items())):
        axr[0].imshow(image); axr[0].set_ylabel(name, fontsize=9)
        for b,(ax,a) in enumerate(zip(axr[1:], ms)):
            top = max(maps[k][b].max() for k in maps)
            im = ax.imshow(a, extent=(0, w, h, 0), cmap='viridis', vmin=0, vmax=top)
            if r==len(maps)-1: fig.colorbar(im, ax=axs[:,b+1], location='bottom', shrink=.8, aspect=12).ax.tick_params(labelsize=7)
            if r==0: ax.set_title(f'$A_{b+1}$', fontsize=9)
        for ax in axr: ax.plot(column*w, row*h, '*', ms=11, color='red', mec='white', mew=.8); ax.set(xticks=[], yticks=[])
    return fig

# %% [markdown]
# The point lies in an object: the middle of the mask of the smallest class that covers at least one per cent of the image.

# %%
def object_point(src, id):
    "A point well inside the smallest class of an image, as shares of height and width"
    from scipy.ndimage import distance_transform_edt
    mask = src.mask(id)
    ids, n = np.unique(mask[mask<254], return_counts=True)
    c = min((k for k in zip(n, ids) if k[0]>=.01*mask.size), default=(0, ids[0]))[1]
    y, x = np.unravel_index(distance_transform_edt(mask==c).argmax(), mask.shape)
    return (y+.5)/mask.shape[0], (x+.5)/mask.shape[1]

for k,p in pairs.items():
    for i in p[0].splits['val'][:2]:
        fig = draw_attention(p, i, *object_point(p[0], i))
        save(fig, f'figure3_{k}_{i}'); plt.show()

# %% [markdown]
# How far these maps are from uniform, over a few images: the entropy of a row of $A_l$ divided by that of a uniform row, 1 for no
# preference at all.

# %%
def evenness(model, src, ids):
    "Mean entropy of the rows of each block's map, as a share of the largest possible"
    out = []
    for i in ids:
        with AttentionTap(model) as tap, torch.no_grad(): model(image_tensor(src.image(i)))
        out.append([(-(A := attention_map(l)[0]).clamp_min(1e-12).log()*A).sum(-1).mean().item()/np.log(A.shape[-1]) for l in tap.blocks.values()])
    return np.mean(out, 0)

for k,(src,_,models) in pairs.items():
    for n,m in models.items(): print(f"{k}, {n}: "+', '.join(f'A{b+1} {e:.2f}' for b,e in enumerate(evenness(m, src, src.splits['val'][:4]))))

# %% [markdown]
# In a running notebook the point can be chosen with sliders: `explore('scenes')` as the last line of a cell shows them (needs ipywidgets).

# %%
try: from ipywidgets import FloatSlider, Dropdown, interactive
except ImportError: print("no ipywidgets here: the point cannot be chosen interactively")
else:
    def explore(k):
        "Sliders for image and point of Figure 3"
        slider = lambda v: FloatSlider(value=v, min=0, max=.99, step=.01, continuous_update=False)
        def draw(image, row, column): draw_attention(pairs[k], image, row, column); plt.show()
        return interactive(draw, image=Dropdown(options=pairs[k][0].splits['val']), row=slider(.5), column=slider(.5))
    test_eq([c.value for c in explore(next(iter(pairs))).children[1:3]], [.5, .5])

# %% [markdown]
# ## Figure 4: the sheet
#
# Fixed images, evenly spaced through the validation set, so that nobody chose them.

# %%
for k,pair in pairs.items():
    ids = pair[0].splits['val']
    fig = draw_rows(predictions(pair, [ids[i] for i in np.linspace(0, len(ids)-1, 4).astype(int)]), titles, pair[0], 1.4)
    save(fig, f'figure4_fixed_{k}'); plt.show()

# %% [markdown]
# And the worst cases: of up to 24 validation images, evenly spaced, those on which SASFormer loses most against the baseline, and the one
# on which it gains most.

# %%
def per_image(pair, most=24):
    "mIoU of both models on single images, ids and (n, 2)"
    src, _, models = pair
    ids = [src.splits['val'][i] for i in np.unique(np.linspace(0, len(src.splits['val'])-1, most).astype(int))]
    miou = lambda m, i: 100*ConfusionMatrix(len(src.classes)).update(torch.from_numpy(predict_image(m, src.image(i)))[None], torch.from_numpy(src.mask(i))[None]).miou
    return ids, np.array([[miou(m, i) for m in models.values()] for i in ids])

for k,pair in pairs.items():
    ids, scores = per_image(pair)
    gain = scores[:,1]-scores[:,0]
    order = np.argsort(gain)
    print(f"{k}: SASFormer is above the baseline on {(gain>0).sum()} of {len(ids)} images; gain from {gain.min():+.1f} to {gain.max():+.1f}, median {np.median(gain):+.1f} points of mIoU; "
          f"below: {', '.join(f'{gain[i]:+.1f}' for i in (*order[:3], order[-1]))}")
    fig = draw_rows(predictions(pair, [ids[i] for i in (*order[:3], order[-1])]), titles, pair[0], 1.4)
    save(fig, f'figure4_worst_{k}'); plt.show()

# %% [markdown]
# ## Training curves
#
# From the committed result files: the partial cross-entropy $L_{seg}$ (of the sum that is logged, less α times the mean of the blocks'
# terms), each block's $L_{aff}^l$, and mIoU on the validation images.

# %%
def draw_curves(folder, baseline, ours):
    "Curves of seed 0 of two variants"
    df = read_results(results/folder)
    df = df[df.seed==0].set_index('variant')
    if not {baseline, ours} <= set(df.index): return print(f"{folder}: no result files of {baseline} and {ours}, seed 0")
    fig, axs = plt.subplots(1, 3, figsize=(9.5, 2.8), dpi=80, layout='constrained')
    for n,name in enumerate((baseline, ours)):
        rows, alpha = df.curve[name], df.settings[name].get('alpha', 0)
        terms = [[r[k] for k in sorted(r) if k.startswith('aff')] for r in rows]
        axs[0].plot([r['epoch'] for r in rows], [r['train_loss']-(alpha*np.mean(a) if a else 0) for r,a in zip(rows, terms)], color=f'C{n}', label=name)
        axs[2].plot(*zip(*[(r['epoch'], 100*r['miou']) for r in rows if r.get('miou') is not None]), 'o-', ms=4, color=f'C{n}', label=name)
    on = [r for r in df.curve[ours] if any(k.startswith('aff') for k in r)]
    for b,k in enumerate(sorted(k for k in on[0] if k.startswith('aff'))): axs[1].plot([r['epoch'] for r in on], [r[k] for r in on], color=f'C{b}', ls=('-','--','-.',':')[b%4], label=f'$L_{{aff}}^{b+1}$')
    for ax,title in zip(axs, ('$L_{seg}$', '$L_{aff}$ by block', 'mIoU, per cent')): ax.set(title=title, xlabel='epoch'); ax.grid(alpha=.3); ax.legend(fontsize=7)
    save(fig, f'curves_{folder}'); plt.show()

for folder,baseline,ours in (('mini','point-baseline','point-sasformer'), ('scenes','baseline','sasformer'), ('camvid','points-baseline','points-sasformer')): draw_curves(folder, baseline, ours)
