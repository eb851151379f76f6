"MaskFormer as a segmenter, its matching and losses, and the method that trains it"
import math

import pytest, torch, torch.nn.functional as F
from conftest import connected, fork_two
from fastai.vision.all import Callback
from sasformer.data import sparse_dataloaders
from sasformer.datasets import scenes
from sasformer.inference import multi_scale_logits, predict_logits
from sasformer.learner import (RunFolder, load_segmenter, parameter_groups, partial_cross_entropy, save_segmenter,
                               sparse_learner)
from sasformer.machine import is_first
from sasformer.maskformer import MaskFormerDecoder, Proposals, ProposalTap, semantic_scores
from sasformer.matching import (MaskFormerLoss, class_loss, class_targets, focal_and_dice, mask_losses, match,
                                matching_cost)
from sasformer.recipes import Recipe
from sasformer.segmenters import create_segmenter, list_segmenters
from sasformer.tel import TreeEnergyLoss

SMALL = dict(decoder_dim=64, n_queries=7, n_layers=2)


def small(name='resnet10t', **kw): return create_segmenter(f'maskformer_{name}', 5, **{**SMALL, **kw})


def random_proposals(L=2, B=2, Q=6, C=5, h=5, w=7):
    return Proposals(torch.randn(L, B, Q, C+1).double(), 3*torch.randn(L, B, Q, h, w).double(), None)


@pytest.fixture(scope='module')
def src(): return scenes(n_train=8, n_val=2, size=32)


def learner(src, annotation='dense', method='maskformer', bs=4, **kw):
    dls = sparse_dataloaders(src, annotation, size=32, bs=bs, device='cpu')
    return sparse_learner(dls, 'maskformer_resnet10t', method, precision='fp32', **{**SMALL, 'lr': 1e-4, **kw})


def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=n)
    return learn


@pytest.mark.parametrize('name,stride,kw', [
    ('mit_b0', 4, {}), ('vit_tiny_patch16_224', 16, {}), ('resnet10t', 4, dict(n_queries=1, n_layers=1)),
    ('tf_efficientnet_lite0', 4, dict(n_queries=130, n_layers=3))])
def test_backbones_and_odd_sizes(name, stride, kw):
    "Any backbone, number of queries and layers; every parameter learns; scores of the image's size in evaluation"
    model, kw = small(name, **kw), {**SMALL, **kw}
    x = torch.randn(2, 3, 77, 98)
    with ProposalTap(model) as tap: y = model(x)
    p, L, Q = tap.proposals, kw['n_layers'], kw['n_queries']
    size = (math.ceil(77/stride), math.ceil(98/stride))
    shapes = dict(classes=(L, 2, Q, 6), masks=(L, 2, Q, *size), pixels=(2, 64, *size))
    assert {k: tuple(v.shape) for k, v in p._asdict().items()} == shapes
    assert y.shape == (2, 5, *((77, 98) if model.multiple > 1 else size))
    partial_cross_entropy(y, torch.randint(0, 5, (2, 77, 98))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with ProposalTap(model.eval()) as tap, torch.no_grad(): y = model(x)
    assert y.shape == (2, 5, 77, 98) and len(tap.proposals.masks) == 1
    below, right = -77%model.multiple, -98%model.multiple
    masks = F.interpolate(tap.proposals.masks[0], (77+below, 98+right), mode='bilinear')[...,:77,:98].sigmoid()
    exact = torch.einsum('bqc,bqhw->bchw', tap.proposals.classes[0].softmax(-1)[...,:5], masks)
    torch.testing.assert_close(y.exp(), exact)
    torch.testing.assert_close(predict_logits(model, x), y)


def test_scores_are_finite_where_all_say_no_object():
    classes = torch.zeros(1, 3, 6)
    classes[...,-1] = 500.
    classes.requires_grad_()
    masks = torch.full((1, 3, 4, 4), -500., requires_grad=True)
    y = semantic_scores(classes, masks)
    y.softmax(1).square().sum().backward()
    assert y.isfinite().all() and classes.grad.isfinite().all() and masks.grad.isfinite().all()
    torch.testing.assert_close(y.softmax(1), torch.full_like(y, 1/5))


def test_scores_in_mixed_precision():
    "Votes and sigmoids are float32, whatever the layers before them make"
    model = small().eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16), ProposalTap(model) as tap: y = model(x)
    p = tap.proposals
    assert y.dtype == torch.float32 and p.masks.dtype == torch.bfloat16
    torch.testing.assert_close(y, semantic_scores(p.classes[-1].float(), p.masks[-1].float(), (32, 32)))


def test_multi_scale():
    model, x = small().eval(), torch.randn(1, 3, 40, 48)
    y = multi_scale_logits(model, x, (1., 1.5), True)
    assert y.shape == (1, 5, 40, 48) and y.isfinite().all()
    torch.testing.assert_close(multi_scale_logits(model, x, (1.,), False).softmax(1), model(x).softmax(1))


def test_names():
    assert {'maskformer_mit_b0', 'maskformer_resnet50', 'maskformer_vit_tiny_patch16_224'} <= set(list_segmenters())
    with pytest.raises(ValueError, match="did you mean 'maskformer_mit_b0'"): create_segmenter('maskfomer_mit_b0', 5)
    with pytest.raises(ValueError, match='multiple of 32, at least 64, got decoder_dim=32'): small(decoder_dim=32)
    with pytest.raises(ValueError, match='n_queries=0: expected at least 1'): small(n_queries=0)
    with pytest.raises(ValueError, match=r'segformer_mit_b0: n_queries=5 is for maskformer_<timm model>'):
        create_segmenter('segformer_mit_b0', 5, n_queries=5)
    with pytest.raises(ValueError, match='n_layers=3: only maskformer_<timm model> has it, not segformer_mit_b0'):
        Recipe(epochs=1, n_layers=3)
    with pytest.raises(ValueError, match='clip=-1.0: expected more than 0'): Recipe(epochs=1, clip=-1.)


def test_what_needs_another_model_says_so(src):
    dls = sparse_dataloaders(src, 'dense', size=32, bs=4, device='cpu')
    with pytest.raises(ValueError, match='segformer_resnet10t makes no proposals: expected a model maskformer_'):
        sparse_learner(dls, 'segformer_resnet10t', 'maskformer', decoder_dim=8)
    with pytest.raises(ValueError, match=r"no decoder.classify: use trees=\('low',\)"):
        learner(src, method=TreeEnergyLoss())
    with pytest.raises(ValueError, match='novel class 9: expected of the classes 0 to'):
        learner(src, method=MaskFormerLoss(novel=[9]))
    with pytest.raises(ValueError, match="pixels='some': expected all or labelled"): MaskFormerLoss(pixels='some')
    with pytest.raises(ValueError, match='clip=0: expected more than 0'): learner(src, clip=0)


def test_checkpoint(tmp_path):
    model, x = small('mit_b0').eval(), torch.randn(1, 3, 45, 50)
    save_segmenter(model, tmp_path)
    again = load_segmenter(tmp_path/'last.safetensors')
    assert again.config['n_queries'] == 7
    with torch.no_grad(): assert torch.equal(again(x), model(x))


def test_queries_do_not_decay():
    model = small()
    groups = parameter_groups(model)
    assert sum(map(len, groups)) == len(list(model.parameters()))
    queries = model.decoder.proposals.queries.weight
    assert any(queries is p for p in groups[3]) and not any(queries is p for p in groups[2])


def test_transformers_masks_and_classes():
    "Whole proposals: transformers' own modules and heads with our weights"
    hf = pytest.importorskip('transformers.models.maskformer.modeling_maskformer')
    from transformers import MaskFormerConfig, MaskFormerDetrConfig
    torch.manual_seed(0)
    net = small('resnet10t', n_layers=3, dropout=0.).decoder.proposals.double()
    channels = [64, 128, 256, 512]
    detr = MaskFormerDetrConfig(num_queries=7, d_model=64, decoder_layers=3)
    config = MaskFormerConfig(decoder_config=detr.to_dict())
    config.decoder_config._attn_implementation = 'sdpa'
    pixels = hf.MaskFormerPixelDecoder(in_features=512, lateral_widths=channels[:-1], feature_size=64,
                                       mask_feature_size=64).double().eval()
    transformer = hf.MaskFormerTransformerModule(512, config).double().eval()
    head = hf.MaskformerMLPPredictionHead(64, 64, 64).double()
    # both list their weights in the order in which they are used, but for the levels of the pyramid
    def copy(to, of): to.load_state_dict(dict(zip(to.state_dict(), of, strict=True)))
    weights = lambda *modules: [p for m in modules for p in m.state_dict().values()]
    own = net.pixels
    levels = [m for pair in zip(own.lateral[::-1], own.smooth[::-1]) for m in pair]
    copy(pixels, weights(own.top, *levels, own.embed))
    copy(head, weights(net.mask))
    t = transformer
    copy(t.queries_embedder, weights(net.queries)); copy(t.input_projection, weights(net.project))
    copy(t.decoder.layernorm, weights(net.norm))
    for a, b in zip(t.decoder.layers, net.layers):
        for x, y in ((a.self_attn, b.self_attention), (a.encoder_attn, b.cross_attention)):
            q, k, v = zip(y.in_proj_weight.chunk(3), y.in_proj_bias.chunk(3))
            for proj, w in ((x.q_proj, q), (x.k_proj, k), (x.v_proj, v), (x.o_proj, weights(y.out_proj))): copy(proj, w)
        for x, y in zip((a.self_attn_layer_norm, a.encoder_attn_layer_norm, a.final_layer_norm), b.norms):
            copy(x, weights(y))
        copy(a.mlp, weights(b.mlp))
    feats = [torch.randn(2, c, *s).double() for c, s in zip(channels, ((11, 13), (6, 7), (3, 4), (2, 2)))]
    with torch.no_grad():
        p, e = net(feats), pixels(feats).last_hidden_state
        states = t(feats[-1], output_hidden_states=True).hidden_states
        queries = torch.stack([*(t.decoder.layernorm(s) for s in states[1:-1]), states[-1]])
        masks = torch.einsum('lbqc,bchw->lbqhw', head(queries), e)
        torch.testing.assert_close(p.masks, masks, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(p.classes, net.name(queries), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('seed', range(3))
def test_transformers_loss(seed):
    hf = pytest.importorskip('transformers.models.maskformer.modeling_maskformer')
    torch.manual_seed(seed)
    p, y = random_proposals(), torch.randint(0, 1+seed, (2, 21, 27))
    targets = class_targets(y)
    theirs = hf.MaskFormerLoss(5, hf.MaskFormerHungarianMatcher(1., 20., 1.), {}, .1).double()
    theirs.empty_weight[-1] = .1
    p = Proposals(*(t.requires_grad_() for t in p[:2]), None)
    l = [theirs(m, c, [t.masks.double() for t in targets], [t.classes for t in targets]) for c, m in zip(*p[:2])]
    total = sum(o['loss_cross_entropy']+20*o['loss_mask']+o['loss_dice'] for o in l)
    m = match(p, targets)
    focal, dice = mask_losses(p.masks, m, targets)
    ours = class_loss(p.classes, m)+20*focal+dice
    torch.testing.assert_close(ours, total, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(ours, p[:2]), torch.autograd.grad(total, p[:2])):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_half_precision_does_not_overflow():
    "More pixels than float16 can count"
    y = torch.arange(3).repeat_interleave(140)[:,None].expand(420, 420)[None]
    masks = torch.stack([torch.where(y[0] == k, 4., -4.) for k in (2, 0, 1)])[None,None].half()   # only they tell
    found = match(Proposals(torch.zeros(1, 1, 3, 5).half(), masks, None), class_targets(y))
    assert dict(zip(found.name.tolist(), found.query.tolist())) == {2: 0, 0: 1, 1: 2}


def test_columns_stay_with_their_targets():
    "A base class whose pixels all vanish at the small size is still one with a mask, a novel one still without"
    y = torch.zeros(1, 20, 28, dtype=torch.long)
    y[0,3,3], y[0,:,20:] = 1, 3
    p, t = random_proposals(B=1), class_targets(y, torch.ones(1, 5), novel=[0, 4])[0]
    assert t.classes.tolist() == [1, 3] and t.novel.tolist() == [0, 4]
    assert not F.interpolate(t.masks[None].float(), (5, 7))[0,0].any()
    cost = matching_cost(p.classes[0,0], p.masks[0,0], t)
    names = -p.classes[0,0].softmax(-1)[:,[1, 3, 0, 4]]
    torch.testing.assert_close(cost[:,2:], names[:,2:])
    none = p.masks[0,0].flatten(1)
    focal, dice = focal_and_dice(none, torch.zeros_like(none, dtype=torch.bool))
    torch.testing.assert_close(cost[:,0], names[:,0]+20*focal+dice)


def test_hidden_masks_of_novel_classes_change_no_bit():
    y = torch.randint(0, 5, (2, 20, 28))
    other = y.where(y < 3, torch.randint(3, 5, y.shape))
    p, tags = random_proposals(), torch.ones(2, 5)
    for pixels in ('all', 'labelled'):
        def losses(y):
            t = class_targets(y, tags, [3, 4])
            m = match(p, t, pixels=pixels)
            return [*m, *mask_losses(p.masks, m, t, pixels=pixels), class_loss(p.classes, m)]
        assert all(torch.equal(a, b) for a, b in zip(losses(y), losses(other), strict=True))


def test_labelled_pixels_alone_count():
    "What the masks are elsewhere changes neither losses nor matching; with all pixels it does"
    y = torch.full((1, 20, 28), 255)
    y[0,:8,:8], y[0,:8,12:16] = 0, 1
    p, t = random_proposals(B=1), class_targets(y)
    far = p.masks.clone()
    far[...,3:,:], far[...,5:] = 9, 9   # more than a cell away, so that no bilinear weight reaches it
    differ = {}
    for pixels in ('all', 'labelled'):
        both = []
        for masks in (p.masks, far):
            q = p._replace(masks=masks)
            m = match(q, t, pixels=pixels)
            both.append([*m, *mask_losses(masks, m, t, pixels=pixels)])
        differ[pixels] = not all(map(torch.equal, *both))
    assert differ == dict(all=True, labelled=False)


def test_both_kinds_of_pixels_agree_on_full_labels():
    "Where every pixel is labelled, the losses are those of all pixels; positions are computed in the masks' precision"
    p, t = random_proposals(), class_targets(torch.randint(0, 4, (2, 21, 27)))
    m = match(p, t)
    for a, b in zip(mask_losses(p.masks, m, t), mask_losses(p.masks, m, t, pixels='labelled')):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('pixels', ['all', 'labelled'])
def test_nothing_labelled(pixels):
    "No number that is none, and a gradient (of zeros) for every proposal"
    p = Proposals(*(t.requires_grad_() for t in random_proposals()[:2]), None)
    t = class_targets(torch.full((2, 20, 28), 255))
    m = match(p, t, pixels=pixels)
    focal, dice = mask_losses(p.masks, m, t, pixels=pixels)
    none = class_loss(p.classes, m, counted=torch.zeros(2, dtype=torch.bool))
    (focal+dice+none+class_loss(p.classes, m)).backward()
    assert focal == dice == none == 0 and (p.masks.grad == 0).all() and p.classes.grad.abs().max() > 0


def test_more_targets_than_queries(src):
    with pytest.raises(ValueError, match=r'holds \d classes, and the model proposes 1 regions: expected n_queries of'):
        fit(learner(src, n_queries=1))


@pytest.mark.parametrize('annotation,counted', [('dense', 'all'), ('scribble', 'labelled'), ('point', 'labelled')])
def test_training(src, annotation, counted):
    seen = []
    class Labelled(Callback):
        order, run_valid = 30, False
        def after_loss(self):
            seen.append((self.loss.item(), sum(v.item() for v in self.mask_former_loss.terms().values())))
    learn = learner(src, annotation, cbs=Labelled())
    before = [p.clone() for p in learn.model.parameters()]
    fit(learn)
    assert learn.mask_former_loss.counted == counted
    assert list(learn.mask_former_loss.epochs[0]) == ['class', 'mask', 'dice']
    assert all(total == pytest.approx(own, rel=1e-6) for total, own in seen)   # the cross-entropy is no part of it
    assert all(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_padded_input(src):
    "A ViT pads its input: labels are padded as it is, and its masks cover both"
    dls = sparse_dataloaders(src, 'dense', size=36, bs=4, device='cpu')
    seen = []
    class Look(Callback):
        order, run_valid = 30, False
        def after_loss(self): seen.append([t.masks.shape[1:] for t in self.mask_former_loss.targets])
    learn = sparse_learner(dls, 'maskformer_vit_tiny_patch16_224', 'maskformer', cbs=Look(), lr=1e-4, **SMALL)
    fit(learn)
    assert {tuple(s) for o in seen for s in o} == {(48, 48)}


def test_clip(src):
    norms = []
    class Norm(Callback):
        order = 50
        def before_step(self):
            norms.append(torch.stack([p.grad.square().sum() for p in self.model.parameters()]).sum().sqrt().item())
    fit(learner(src, cbs=Norm(), clip=.01))
    clipped = list(norms)
    norms.clear()
    fit(learner(src, cbs=Norm()))
    assert min(norms) > .02 and max(clipped) <= .01*(1+1e-4) and min(clipped) > .0099


def test_resume_bit_for_bit(src, tmp_path):
    class Killed(Exception): pass
    class Kill(Callback):
        def before_epoch(self):
            if self.epoch == 1: raise Killed('by the test')
    def run(folder, resume=False, *cbs): return learner(src, clip=.01, cbs=[RunFolder(folder, resume=resume), *cbs])
    whole = fit(run(tmp_path/'a'), 2)
    with pytest.raises(Killed): fit(run(tmp_path/'b', False, Kill()), 2)
    again = fit(run(tmp_path/'b', True), 2)
    states = [l.model.state_dict() for l in (whole, again)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def train_both_kinds(file):
    src, out = scenes(n_train=4, n_val=2, size=32), {}
    for i in src.splits['train'][1::2]: src.masks[i][:] = 255   # one process has images without a label
    for pixels in ('all', 'labelled'):
        dls = sparse_dataloaders(src, 'dense', size=32, bs=4, device='cpu')
        kw = dict(decoder_dim=64, n_queries=7, n_layers=2, dropout=0., opt='sgd', lr=1e-3, precision='fp32')
        learn = sparse_learner(dls, 'maskformer_convnext_atto', MaskFormerLoss(pixels=pixels), **kw)
        dls.train.order = lambda dataset: range(4)
        with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=2)
        out[pixels] = learn.mask_former_loss.epochs, learn.model.state_dict()
    if is_first(): torch.save(out, file)


def test_two_processes_are_one(tmp_path):
    "Losses and weights, though one process sees no label at all (a backbone without batch normalisation)"
    two = fork_two(connected, train_both_kinds, tmp_path/'2.pt')
    train_both_kinds(tmp_path/'1.pt')
    for p in two: p.finish()
    for pixels in ('all', 'labelled'):
        (one, a), (two, b) = (torch.load(tmp_path/f'{n}.pt')[pixels] for n in (1, 2))
        for x, y in zip(one, two): assert x == pytest.approx(y, rel=1e-4)
        for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)
