"Confusion matrix against brute force and other libraries, its errors, its fastai metrics, several processes"
import math, numpy as np, pytest, torch, torch.distributed as dist
from types import SimpleNamespace
from conftest import connected, fork_two
from sasformer.metrics import ConfusionMatrix, SegmentationMetrics, to_labels


def example(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, n-1, (3, 17, 23), generator=g)
    pred = torch.where(torch.rand(target.shape, generator=g) < .6, target,
                       torch.randint(0, n, target.shape, generator=g))
    target[:, :2], target[:, :, 5] = 255, 254
    return pred, target


def test_brute_force():
    pred, target = example()
    counts = np.zeros((6, 6), int)
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist()):
        if t not in (254, 255): counts[t, p] += 1
    cm = ConfusionMatrix(6)
    for i in range(3): cm.update(pred[i:i+1], target[i:i+1])
    assert (cm.counts.numpy() == counts).all() and cm.counts.dtype == torch.int64
    iou = [counts[c,c]/(counts[c].sum()+counts[:,c].sum()-counts[c,c]) for c in range(6)]
    assert np.allclose(cm.iou, iou) and np.isclose(cm.miou, np.mean(iou))
    assert iou[5] == 0 and cm.recall[5].isnan()       # only predicted: in the mean IoU, not in the mean accuracy
    assert np.isclose(cm.mean_accuracy, np.mean([counts[c,c]/counts[c].sum() for c in range(5)]))
    assert np.isclose(cm.pixel_accuracy, counts.trace()/counts.sum())


def test_torchmetrics():
    tm = pytest.importorskip('torchmetrics.classification')
    pred, target = example()
    keep = target < 254
    cm = ConfusionMatrix(6).update(pred, target)
    assert (cm.counts == tm.MulticlassConfusionMatrix(6)(pred[keep], target[keep])).all()
    assert torch.allclose(cm.iou.float(), tm.MulticlassJaccardIndex(6, average='none')(pred[keep], target[keep]))


def test_absent_class_is_not_in_the_mean():
    ids = torch.tensor([[[0, 1]]])
    cm = ConfusionMatrix(9).update(ids, ids)
    assert cm.miou == 1 and cm.iou[2:].isnan().all()
    assert np.isnan(ConfusionMatrix(2).update(ids, torch.full_like(ids, 255)).miou)


def test_scores_are_resized_before_the_largest_is_taken():
    scores, target = torch.randn(2, 6, 5, 7), torch.randint(0, 6, (2, 19, 26))
    up = torch.nn.functional.interpolate(scores, (19, 26), mode='bilinear', align_corners=False).argmax(1)
    assert (to_labels(scores, (19, 26)) == up).all()
    assert (ConfusionMatrix(6).update(scores, target).counts == ConfusionMatrix(6).update(up, target).counts).all()


@pytest.mark.parametrize('pred,target,message', [
    (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), 3), r'target holds \[3\]'),
    (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), -100), r'target holds \[-100\]'),
    (torch.full((1, 2, 2), 7), torch.zeros(1, 2, 2).long(), r'prediction holds \[7\]'),
    (torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 2).long(), 'differ in shape'),
    (torch.zeros(1, 5, 2, 2), torch.zeros(1, 2, 2).long(), r'expected \(B, 3, h, w\)')])
def test_errors_leave_the_counts(pred, target, message):
    cm = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message): cm.update(pred, target)
    assert cm.counts.sum() == 0


def test_learner_metrics_share_a_matrix():
    group = SegmentationMetrics(6)
    pred, target = example()
    assert [m.name for m in group] == ['miou', 'pixel_accuracy', 'mean_accuracy']
    for epoch in range(2):
        for m in group: m.reset()
        for i in range(3):
            for m in group: m.accumulate(SimpleNamespace(pred=pred[i:i+1], y=target[i:i+1], dl=None))
        cm = ConfusionMatrix(6).update(pred, target)
        assert [m.value for m in group] == [cm.miou, cm.pixel_accuracy, cm.mean_accuracy]


def test_dice_against_sets():
    pred, target = example()
    cm, on = ConfusionMatrix(6).update(pred, target), target < 254
    for c in range(6):
        p, t = (pred == c) & on, (target == c) & on
        if (p | t).any(): assert abs(cm.dice[c] - 2*(p & t).sum()/(p.sum() + t.sum())) < 1e-6
        else: assert cm.dice[c].isnan()
    assert cm.mean_dice == cm.dice.nanmean().item()


def test_groups_of_classes():
    pred, target = example()
    cm = ConfusionMatrix(6).update(pred, target)
    got = cm.group_iou(dict(base=(0, 2, 3), novel=[1, 4]))
    assert list(got) == ['base', 'novel', 'harmonic']
    assert got['base'] == cm.iou[[0, 2, 3]].nanmean().item() and got['novel'] == cm.iou[[1, 4]].nanmean().item()
    assert abs(got['harmonic'] - 2/(1/got['base'] + 1/got['novel'])) < 1e-12
    assert list(cm.group_iou(dict(things=[1], stuff=[0]))) == ['things', 'stuff']
    wrong = ConfusionMatrix(2).update(torch.zeros(1, 2, 2, dtype=torch.long), torch.ones(1, 2, 2, dtype=torch.long))
    assert wrong.group_iou(dict(base=[0], novel=[1])) == dict(base=0., novel=0., harmonic=0.)
    assert math.isnan(ConfusionMatrix(2).group_iou(dict(base=[0], novel=[1]))['harmonic'])
    for ids in ([6], [-1], []):
        with pytest.raises(ValueError, match="group 'novel'"): cm.group_iou(dict(base=[0], novel=ids))


def test_learner_metrics_of_groups():
    pred, target = example()
    groups = dict(base=[0, 1, 2], novel=[3, 4, 5])
    group = SegmentationMetrics(6, groups=groups)
    # a sample has two targets in a training, the label map first
    for m in group: m.accumulate(SimpleNamespace(pred=pred, y=(target, torch.zeros(len(target), 6)), dl=None))
    values = {m.name: m.value for m in group}
    assert list(values) == ['miou', 'pixel_accuracy', 'mean_accuracy', 'miou_base', 'miou_novel', 'miou_harmonic']
    assert list(values.values())[3:] == list(ConfusionMatrix(6).update(pred, target).group_iou(groups).values())
    with pytest.raises(ValueError, match="group 'novel'"): SegmentationMetrics(6, groups=dict(novel=[6]))


@pytest.mark.parametrize('n,world_size,bs', [(10, 4, 2), (10, 4, 5), (3, 4, 2), (12, 4, 2), (5, 2, 1)])
def test_repeated_samples_of_a_distributed_loader(n, world_size, bs):
    pred, target = torch.randint(0, 4, (n, 5, 5)), torch.randint(0, 4, (n, 5, 5))
    n_padded = -(-n//world_size)*world_size
    idxs, total = (list(range(n))*2)[:n_padded], 0
    for rank in range(world_size):
        group, own = SegmentationMetrics(4), idxs[rank*n_padded//world_size:(rank+1)*n_padded//world_size]
        for start in range(0, len(own), bs):
            part = own[start:start+bs]
            dl = SimpleNamespace(n=n, n_padded=n_padded, i=start+len(part), rank=rank, world_size=world_size)
            group.accumulate(SimpleNamespace(pred=pred[part], y=target[part], dl=dl))
        total = total + group.confusion.counts
    assert (total == ConfusionMatrix(4).update(pred, target).counts).all()


def share_of_a_matrix():
    rank = dist.get_rank()
    torch.manual_seed(0)
    pred, target = torch.randint(0, 5, (2, 4, 9, 9))
    whole = ConfusionMatrix(5).update(pred, target)
    assert (ConfusionMatrix(5).update(pred[rank::2], target[rank::2]).all_reduce().counts == whole.counts).all()
    group = SegmentationMetrics(5)
    group.accumulate(SimpleNamespace(pred=pred[rank::2], y=target[rank::2], dl=None))
    assert [m.value for m in group] == [whole.miou, whole.pixel_accuracy, whole.mean_accuracy]


def test_two_processes():
    for p in fork_two(connected, share_of_a_matrix): p.finish()
