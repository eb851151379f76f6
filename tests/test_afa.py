"Masks from tags: what AFA teaches, refuses and leaves behind, in one process and in two, killed and resumed"
import json

import numpy as np, pytest, torch, torch.nn.functional as F
from sasformer import afa, crf
from sasformer.afa import (AFAHeads, AFALoss, TagMaps, affinity_pairs, attention_affinity, label_stages, pair_loss,
                           random_walk, window_mask)
from sasformer.attention import QK
from sasformer.cam import (class_activation_maps, foreground, halved, id_table, image_boxes, pseudo_labels,
                           tagged_scores)
from sasformer.data import sparse_dataloaders
from sasformer.datasets import Source, scenes
from sasformer.annotations import read_label_map
from sasformer.evaluate import main as evaluate, open_data
from sasformer.labels import main
from sasformer.learner import load_segmenter, save_segmenter, sparse_learner
from sasformer.methods import STAGES, parse_method
from sasformer.refine import unfolded_refinement
from sasformer.tag_labels import evaluate_stages, load_afa
from sasformer.segmenters import create_segmenter
from conftest import fork_two, write_folder
from test_train import SMALL, kill_in_second_epoch, rows, start, train, weights

METHOD = 'afa:labels_from=0.3,propagated_from=0.6,par_iterations=2'

@pytest.fixture(scope='module')
def src(): return scenes(n_train=16, n_val=4, size=64)

@pytest.fixture(scope='module')
def dls(src): return sparse_dataloaders(src, 'tag', size=64, bs=8)

@pytest.fixture(scope='module')
def tags(src, tmp_path_factory):
    "A folder of scenes, and the options to train on its tags"
    path = tmp_path_factory.mktemp('afa')/'scenes'
    write_folder(src, path)
    return ('--data', 'folder', '--path', path, '--annotation', 'tag', '--method', METHOD, '--epochs', 3, '--bs', 8)

@pytest.fixture(scope='module')
def whole(tags, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'whole'
    return out, start(*tags, '--out', out).finish()


def test_affinity_of_any_transformer_is_that_of_its_layers():
    "Several layers with different numbers of heads, tokens in front: the sum over maps, map by map, in float64"
    torch.manual_seed(0)
    layers = [QK(*torch.randn(2, 2, h, 7, 4, dtype=torch.float64).float(), .5, (2, 3), (2, 3), 4, 1) for h in (3, 5)]
    conv = torch.nn.Conv2d(8, 1, 1)
    maps = torch.cat([l.q[:,:,1:].double() @ l.k[:,:,1:].double().mT for l in layers], 1)
    expected = (torch.einsum('n,bnij->bij', conv.weight.flatten().double(), maps+maps.mT)+conv.bias).sigmoid()
    assert (attention_affinity(layers, conv)-expected).abs().max() < 1e-5

def test_window_is_clipped_at_the_borders():
    mask = window_mask(5, 7, 2).view(5, 7, 5, 7)
    assert mask[2,3].sum() == 25 and mask[0,0].sum() == 9 and mask[0,0,2,2] and not mask[0,0,3,0]
    assert torch.equal(window_mask(5, 7, 2), window_mask(5, 7, 2).T)

def test_columns_without_affinity_stay_well_below_one():
    out = random_walk(torch.ones(1, 1, 3, 3), torch.full((1, 9, 9), .01))
    assert out.max() < .02   # 9·10⁻⁴/(9·10⁻⁴ + 0.1)

def test_pairs_are_ordered_and_the_diagonal_is_one_of_them():
    positive, negative = affinity_pairs(torch.tensor([[[0, 1], [255, 254]]]))
    assert positive[0].nonzero().tolist() == [[0, 0], [1, 1]] and negative[0].nonzero().tolist() == [[0, 1], [1, 0]]
    assert pair_loss(torch.full((1, 4, 4), .25), positive, negative) == pytest.approx(.5*1.5/3+.5*.5/3)

def test_boxes():
    inside = torch.zeros(2, 5, 6, dtype=torch.bool)
    inside[0,1:3,2:6] = inside[1] = True
    assert image_boxes(inside) == [[1, 3, 2, 6], [0, 5, 0, 6]]

def test_a_crop_keeps_its_images_tags(dls):
    "and nothing of it is labelled"
    x, y, tags = dls.train.one_batch()
    wanted = {dls.train.dataset.src.tags(i) for i in dls.train.dataset.ids}
    assert all(tuple(t.nonzero().flatten().tolist()) in wanted for t in tags) and (y >= 254).all()

def test_padding_is_never_labelled():
    images, maps = torch.rand(1, 3, 16, 16), torch.rand(1, 2, 16, 16)
    inside = torch.zeros(1, 16, 16, dtype=torch.bool)
    inside[:,3:13,2:9] = True
    for box in (False, True):
        scores = tagged_scores(maps if box else halved(maps, images), torch.ones(1, 2))
        label = pseudo_labels(images, *scores, inside, box, iterations=2)
        assert torch.equal(label == 254, ~inside)

def resized(t, size, corners=False): return F.interpolate(t, size, mode='bilinear', align_corners=corners)

def released_label(image, maps, tags, inside, affinity=None, thresholds=(.55, .35), iterations=2):
    "One image, step by step in the released order: labels from the maps, or from those propagated along an affinity"
    H, W = inside.shape
    names, best = torch.tensor([0, *(tags.nonzero().flatten()+1)]), []
    top, bottom, left, right = (0, H, 0, W) if affinity is None else image_boxes(inside[None])[0]
    image = image[None, :, top:bottom, left:right]
    half = [n//2 for n in image.shape[2:]]
    for beta in thresholds:
        P = torch.cat([torch.full((1, H, W), beta), maps])[names][None]
        if affinity is None: P = resized(P, half).softmax(1)
        else:
            n = round(len(affinity)**.5)
            T = affinity**2*window_mask(n, n, 8)
            P = resized(P, (n, n)).softmax(1).flatten(2) @ (T/(T.sum(0)+.1))
            P = resized(P.view(1, -1, n, n), (H, W))[..., top:bottom, left:right]
            P = resized(P, half, corners=True)
        P = unfolded_refinement(resized(image, half), P, iterations=iterations)
        best.append(names[resized(P, image.shape[2:])[0].argmax(0)])
    out = torch.full((H, W), 254)
    out[top:bottom, left:right] = torch.where(best[0] != 0, best[0], torch.where(best[-1] == 0, 0, 255))
    return out.where(inside, torch.tensor(254))

def noisy_maps(n, classes=5, size=64, positions=8):
    "Maps on which a softmax or a resize in another place shows, and an affinity that keeps them apart"
    g = torch.Generator().manual_seed(0)
    A = .05*torch.rand(n, positions**2, positions**2, generator=g)
    return TagMaps(torch.rand(n, classes, size, size, generator=g), A+A.mT+.9*torch.eye(positions**2),
                   (positions, positions), (size, size))

def test_a_step_teaches_with_the_released_labels(dls, monkeypatch):
    "Labels of the affinity from the maps, of the segmentation from propagated ones, pixel by pixel"
    steps, made = [], AFALoss._label_maps
    monkeypatch.setattr(afa, 'tag_maps', lambda model, heads, x, *a: noisy_maps(len(x)))
    def kept(self, *a):
        out = made(self, *a)
        steps.append((self.images, self.tags[:, self.classes], self.label_map != 254, out))
        return out
    monkeypatch.setattr(AFALoss, '_label_maps', kept)
    method = 'afa:labels_from=0,propagated_from=0,par_iterations=2'
    learn = sparse_learner(dls, 'segformer_mit_b0', method, precision='fp32', decoder_dim=32)
    with learn.no_logging(), learn.no_bar(): learn.fit_poly(epochs=1, lr=1e-5)
    for images, tags, inside, out in steps:
        m = noisy_maps(len(images))
        for name, A in (('affinity', [None]*len(images)), ('segmentation', m.affinity)):
            expected = torch.stack([released_label(*o) for o in zip(images, m.maps, tags, inside, A)])
            assert (expected == 255).any() and (expected == 254).any()
            assert (out[name] == expected).float().mean() > .9999, name   # in a tie the last bit decides

@pytest.mark.parametrize('doubtful', [False, True])
def test_stages_are_the_released_labels(src, monkeypatch, doubtful):
    "One threshold for maps and one for propagated maps, or both as in training"
    monkeypatch.setattr(afa, 'tag_maps', lambda model, heads, x, *a: noisy_maps(len(x)))
    model, images = create_segmenter('segformer_mit_b0', 6, decoder_dim=32), torch.rand(2, 3, 64, 64)
    tags = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0.]])
    stages = label_stages(model, AFAHeads(256, 5, 16), images, images, tags, doubtful=doubtful, iterations=2)
    m, inside = noisy_maps(2), torch.ones(64, 64, dtype=torch.bool)
    for name, A, one in (('cam_refined', [None]*2, .45), ('propagated_refined', m.affinity, .35)):
        expected = torch.stack([released_label(*o, inside, a, (.55, .35) if doubtful else (one,))
                                for *o, a in zip(images, m.maps, tags, A)])
        assert (stages[name] == expected).float().mean() > .9999, name

def test_stages_walk_as_the_released_validation():
    "The affinity is that of the image at its own size; labels as in training take the largest scale"
    torch.manual_seed(0)
    model, x = create_segmenter('segformer_mit_b0', 6, decoder_dim=32).eval(), torch.randn(2, 3, 64, 96)
    heads, tags = AFAHeads(256, 5, 16), torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 1, 1.]])
    torch.nn.init.normal_(heads.affinity.weight, std=.05)
    images, labels = torch.rand(2, 3, 64, 96), []
    with torch.no_grad():
        maps = class_activation_maps(model, heads.classify, x)
        for scale in (1, 1.5):
            with afa._last_block(model) as tap: model(x if scale == 1 else resized(x, (96, 144)))
            scores, classes = tagged_scores(resized(maps, tap.layers[0].q_size), tags, [.35])
            walked = random_walk(scores[:, 0], attention_affinity(tap.layers, heads.affinity))
            labels.append(classes.gather(1, resized(walked, (64, 96)).argmax(1).flatten(1)).view(2, 64, 96))
    for thresholds, expected in (((.55, .35), labels[0]), ((.35,), labels[0]), ((.35,), labels[1])):
        doubtful = expected is labels[1]
        stages = label_stages(model, heads, x, images, tags, thresholds=thresholds, doubtful=doubtful, iterations=1)
        assert (stages['propagated'] == expected).float().mean() > .9999
    assert (labels[0] == labels[1]).float().mean() < .999

def test_only_tagged_classes_are_found():
    maps = torch.rand(3, 6, 8, 8)
    tags = torch.tensor([[0, 1, 0, 0, 1, 0], [0]*6, [1]*6])
    label = pseudo_labels(torch.rand(3, 3, 8, 8), *tagged_scores(maps, tags), iterations=0)
    assert set(label[0].unique().tolist()) <= {0, 2, 5, 255} and set(label[1].unique().tolist()) == {0}
    assert set(label[2].unique().tolist()) <= {*range(7), 255}


def test_stages_follow_the_training(dls):
    "Classifier alone, then labels from maps, then from propagated ones; the steps as FACTS counts them"
    loss = AFALoss(labels_from=.1, propagated_from=.3)
    at = lambda step: type('At', (), dict(epoch=step//500, iter=step%500, n_iter=500, n_epoch=40, labels_from=.1,
                                          propagated_from=.3))
    stage = lambda step: AFALoss.stage.fget(at(step))
    assert [stage(s) for s in (0, 2000, 2001, 6000, 6001, 19999)] == [0, 0, 1, 1, 2, 2]

def test_classifier_learns_first(dls):
    learn = sparse_learner(dls, 'segformer_mit_b0', METHOD+',freeze_norms=false', precision='fp32', decoder_dim=32)
    with learn.no_logging(), learn.no_bar(): learn.fit_poly(epochs=4, lr=1e-4)
    epochs = learn.afa_loss.epochs
    assert epochs[0]['seg'] == epochs[0]['aff'] == 0 and epochs[-1]['seg'] > 0 and epochs[-1]['aff'] > 0
    assert not learn.model.backbone._forward_hooks and learn.afa_loss._features is None

def test_norms_stay_as_pretrained(dls):
    learn = sparse_learner(dls, 'segformer_mit_b0', METHOD, precision='fp32', decoder_dim=32)
    backbone = learn.model.backbone
    def unmoved(learn):
        before = {n: p.clone() for n, p in backbone.named_parameters()}
        with learn.no_logging(), learn.no_bar(): learn.fit_poly(epochs=1, lr=1e-3)
        return {n for n, p in backbone.named_parameters() if torch.equal(p, before[n])}
    assert unmoved(learn) == {n for n, p in backbone.named_parameters() if 'norm' in n}
    assert all(p.requires_grad for p in backbone.parameters())   # another learner of this model trains them
    assert not unmoved(sparse_learner(dls, learn.model, METHOD+',freeze_norms=false', precision='fp32'))

def test_a_cnn_has_maps_but_no_affinity(dls):
    with pytest.raises(ValueError, match='queries and keys cannot be read.*with affinity=0 it needs no attention'):
        sparse_learner(dls, 'segformer_resnet18', METHOD)
    learn = sparse_learner(dls, 'segformer_resnet18', METHOD+',affinity=0', precision='fp32', decoder_dim=32)
    with learn.no_logging(), learn.no_bar(): learn.fit_poly(epochs=2, lr=1e-4)
    assert learn.afa_loss.epochs[-1]['seg'] > 0 and learn.afa_loss.epochs[-1]['aff'] == 0
    x = torch.randn(1, 3, 64, 64)
    assert class_activation_maps(learn.model, learn.model.auxiliary['afa'].classify, x).shape == (1, 5, 64, 64)

@pytest.mark.parametrize('model', ['segmenter_vit_tiny_patch16_224', 'segformer_pvt_v2_b0'])
def test_other_transformers(dls, model):
    learn = sparse_learner(dls, model, 'afa:labels_from=0,propagated_from=0', precision='fp32')
    with learn.no_logging(), learn.no_bar(): learn.fit_poly(epochs=1, lr=1e-5)
    assert all(np.isfinite(v) for v in learn.afa_loss.epochs[0].values())

@pytest.mark.parametrize('method', ['afa:labels_from=0+crf:start=0', 'crf:start=0+afa:labels_from=0'])
def test_with_the_regulariser_of_the_released_code(dls, monkeypatch, method):
    "Its gate holds back what AFA's own label map labels in this step, in either order of the names"
    made, gates, label_maps, gate = [], [], AFALoss._label_maps, crf.energy_gate
    monkeypatch.setattr(AFALoss, '_label_maps', lambda *a: made.append(label_maps(*a)) or made[-1])
    monkeypatch.setattr(crf, 'energy_gate', lambda S, labelled: gates.append(labelled) or gate(S, labelled))
    learn = sparse_learner(dls, 'segformer_mit_b0', method, precision='fp32', decoder_dim=32)
    with learn.no_logging(), learn.no_bar(): learn.fit_poly(epochs=1, lr=1e-5)
    assert learn.afa_loss.epochs[0]['seg'] > 0
    assert all(np.isfinite(v) for cb in (learn.afa_loss, learn.crf_loss) for v in cb.epochs[0].values())
    assert len(gates) == 2 and not gates[0].all()
    # stage 0 has no label map: the batch's own, of which nothing but padding is labelled
    assert all(torch.equal(g, m['segmentation'][:, ::2, ::2] != 255) for g, m in zip(gates[-len(made):], made))

def test_fewer_keys_than_queries_are_refused(dls):
    with pytest.raises(ValueError, match='last block of segformer_pvt_v2_b2_li has fewer keys than queries'):
        sparse_learner(dls, 'segformer_pvt_v2_b2_li', METHOD)

def test_a_set_without_background(src):
    "Where the background's score wins, nothing is labelled; every class has a map"
    classes = ['sky', *src.classes[1:]]
    other = Source('sky', None, classes, src.splits, src.images, src.masks, src.palette)
    assert foreground(classes) == (list(range(6)), None) and id_table(*foreground(classes))[0] == 255
    learn = sparse_learner(sparse_dataloaders(other, 'tag', size=64, bs=8), 'segformer_mit_b0',
                           'afa:labels_from=0,propagated_from=0.4', precision='fp32', decoder_dim=32)
    with learn.no_logging(), learn.no_bar(): learn.fit_poly(epochs=2, lr=1e-4)
    assert learn.model.auxiliary['afa'].classify.out_channels == 6
    stages = evaluate_stages(learn.model, other)
    assert all(cm.counts.sum() == 4*64*64 for cm in stages.values())   # each pixel got a class
    with pytest.raises(ValueError, match="background='floor': expected one of sky, striped disc"):
        sparse_learner(sparse_dataloaders(other, 'tag', size=64, bs=8), 'segformer_mit_b0', 'afa:background=floor')


@pytest.mark.parametrize('options, message', [
    ('thresholds=0.3,0.5', 'the higher first'), ('thresholds=0.5,0.4,0.3', 'one or two scores'),
    ('thresholds=1.5', 'between 0 and 1'), ('labels_from=0.5,propagated_from=0.2', 'expected labels_from'),
    ('affinity=-1', 'affinity=-1.0: expected 0 or more'), ('affinity_label=seg', 'expected one of cam, same'),
    ('cam_scales=0', 'cam_scales=.*: expected numbers above 0'), ('dilations=1,-2', 'expected numbers above 0'),
    ('labels_from=nan', 'labels_from=nan'), ('window=3', "no option 'window'")])
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message): parse_method(f'afa:{options}')


def test_two_processes_equal_one(whole, tags, tmp_path):
    one, _ = whole
    for p in fork_two(train.main, SMALL+[str(a) for a in (*tags, '--out', tmp_path/'two')]): p.finish()
    for a, b in zip(rows(one), rows(tmp_path/'two'), strict=True):
        for name in ('train_loss', 'cls', 'seg', 'aff'):
            # a label may flip where two scores tie to the last bit
            assert float(b[name]) == pytest.approx(float(a[name]), rel=5e-3, abs=1e-4), name

def test_killed_and_resumed(whole, tags, tmp_path):
    one, _ = whole
    kill_in_second_epoch(start(*tags, '--out', tmp_path/'cut'), tmp_path/'cut')
    start(*tags, '--out', tmp_path/'cut', '--resume').finish()
    a, b = weights(one), weights(tmp_path/'cut')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert 'auxiliary.afa.classify.weight' in a   # without it there are no maps

def test_from_tags_to_masks(whole, tmp_path, capsys):
    "The heads come back with the model, and `sasformer_labels pseudo` writes its label maps"
    one, _ = whole
    model, options = load_afa(one)
    assert options['iterations'] == 2 and not load_segmenter(one).auxiliary
    main(['pseudo', str(one), '--split', 'val', '--out', str(tmp_path/'masks'), '--thresholds', '0.5'])
    assert '4 label maps written' in capsys.readouterr().out and len(list((tmp_path/'masks').glob('*.png'))) == 4
    main(['pseudo', str(one), '--split', 'val', '--out', str(tmp_path/'held'), '--stage', 'segmentation'])
    src = open_data(one)
    ids, none = foreground(src.classes)
    for i in src.splits['val']:   # every pixel has a class, and only such as the tags allow
        found = set(np.unique(read_label_map(tmp_path/'held'/f'{i}.png')).tolist())
        assert found <= {*src.tags(i)} | ({none} - {None})
    capsys.readouterr()
    for args, message in (((one, '--split', 'val', '--out', tmp_path/'masks'), 'there already'),
                          ((one, '--split', 'vale', '--out', tmp_path/'m'), '--split vale: folder has train, val'),
                          ((one, '--thresholds', '0.2,0.4', '--out', tmp_path/'m'), 'the higher first'),
                          ((one, '--device', 'cuda:9', '--out', tmp_path/'m'), 'cuda:9'),
                          ((tmp_path, '--data', 'scenes', '--out', tmp_path/'m'), 'no such file')):
        with pytest.raises(SystemExit) as stop: main(['pseudo', *map(str, args)])
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and message in printed and printed.count('\n') == 1, printed

def test_eval_measures_every_stage(whole, tmp_path):
    evaluate([str(whole[0]), '--stages', '--out', str(tmp_path/'found.json')])
    found = json.loads((tmp_path/'found.json').read_text())
    assert list(found['stages']) == list(STAGES)
    pixels = {sum(o['pixels'].values()) for o in (found, *found['stages'].values())}
    assert len(pixels) == 1 and all(0 <= o['miou'] <= 1 for o in found['stages'].values())

def test_a_model_without_heads_says_so(tags, tmp_path, capsys):
    save_segmenter(create_segmenter('segformer_mit_b0', 3), tmp_path, classes=['a', 'b', 'c'])
    with pytest.raises(ValueError, match='last.safetensors: holds no heads of AFA'): load_afa(tmp_path)
    with pytest.raises(SystemExit): evaluate([str(tmp_path), *map(str, tags[:4]), '--stages'])
    printed = capsys.readouterr()
    assert 'holds no heads of AFA' in printed.err and printed.err.count('\n') == 1 and not printed.out


def test_frozen_norms_of_a_cnn(src):
    "Batch normalisation of the backbone: neither weights nor statistics move, and each group keeps its learning rate"
    dls = sparse_dataloaders(src, 'tag', size=64, bs=4, device='cpu')
    learn = sparse_learner(dls, 'segformer_resnet18', 'afa:affinity=0,labels_from=0.9,propagated_from=0.9',
                           precision='fp32', decoder_dim=16, lr=1e-3, head_lr=5.)
    norms = [m for m in learn.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [t.clone() for m in norms for t in m.state_dict().values()]
    weight = learn.model.backbone.conv1.weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, [t for m in norms for t in m.state_dict().values()]))
    assert not torch.equal(weight, learn.model.backbone.conv1.weight)
    rate = {id(p): g['lr'] for g in learn.opt.opt.param_groups for p in g['params']}
    heads = learn.model.auxiliary['afa']
    assert rate[id(heads.classify.weight)] == pytest.approx(5*rate[id(learn.model.backbone.conv1.weight)])
