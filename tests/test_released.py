"""The equations once more, word for word and with nothing of the package: a MiT, its attention maps, propagation and
the affinity loss in the paper's and in the released form, against ours with the same weights: values and gradients"""
import pytest, torch, torch.nn.functional as F
from sasformer.attention import AttentionTap, attention_map
from sasformer.learner import PartialCrossEntropy
from sasformer.sasformer import PAPER, RELEASED, affinity_loss, combine
from sasformer.segmenters import create_segmenter

HEADS, REDUCTION, STRIDES = (1, 2, 5, 8), (8, 4, 2, 1), (4, 2, 2, 1)


def norm(x, p, name, eps): return F.layer_norm(x, x.shape[-1:], p[f'{name}.weight'], p[f'{name}.bias'], eps)

def rows(x): return x.flatten(2).transpose(1, 2)

def linear(x, p, name): return F.linear(x, p[f'{name}.weight'], p[f'{name}.bias'])

def conv(x, p, name, **kw): return F.conv2d(x, p[f'{name}.weight'], p[f'{name}.bias'], **kw)

def plain_mit(x, p):
    "MiT-B0 with strides 4, 2, 2, 1: features of each block, and its attention maps, a mean over layers and heads"
    features, maps = [], []
    for s in range(4):
        embed = 'patch_embed' if s == 0 else f'stages_{s}.downsample'
        x = conv(x, p, f'{embed}.proj', stride=STRIDES[s], padding=3 if s == 0 else 1)
        size, x, of_layers = x.shape[-2:], norm(rows(x), p, f'{embed}.norm', 1e-5), []
        for n in range(2):
            name = f'stages_{s}.blocks.{n}'
            y = norm(x, p, f'{name}.norm1', 1e-6)
            z = y
            if REDUCTION[s] > 1:
                z = conv(y.transpose(1, 2).unflatten(2, size), p, f'{name}.attn.sr', stride=REDUCTION[s])
                z = norm(rows(z), p, f'{name}.attn.norm', 1e-5)
            D = y.shape[-1]//HEADS[s]
            q, (k, v) = linear(y, p, f'{name}.attn.q'), linear(z, p, f'{name}.attn.kv').chunk(2, -1)
            q, k, v = (t.unflatten(2, (HEADS[s], D)).transpose(1, 2) for t in (q, k, v))
            A = (q@k.transpose(-1, -2)/D**.5).softmax(-1)                                   # (3)
            of_layers.append(A.mean(1))
            x = x+linear((A@v).transpose(1, 2).flatten(2), p, f'{name}.attn.proj')
            y = linear(norm(x, p, f'{name}.norm2', 1e-6), p, f'{name}.mlp.fc1')
            y = conv(y.transpose(1, 2).unflatten(2, size), p, f'{name}.mlp.dwconv', padding=1, groups=y.shape[-1])
            x = x+linear(F.gelu(rows(y)), p, f'{name}.mlp.fc2')
        x = norm(x, p, f'stages_{s}.norm', 1e-6).transpose(1, 2).unflatten(2, size)
        features.append(x)
        maps.append(sum(of_layers)/len(of_layers))
    return features, maps


def plain_loss(features, maps, logits, labels, released):
    "Equations 4 to 7, one image and one position after the other"
    total = 0
    for f, A in zip(features, maps):
        h, w = f.shape[-2:]
        small = next((a, b) for a, b in ((h//r, w//r) for r in (1, 2, 4, 8)) if a*b == A.shape[2])
        scores = logits if released else logits.softmax(1)
        P, V = (F.interpolate(scores, s, mode='bilinear', align_corners=False) for s in ((h, w), small))
        if released: P, V = P.softmax(1), V.softmax(1)
        near = F.interpolate(labels[:, None].float(), (h, w), mode='nearest')[:, 0].flatten(1)
        distances = []
        for b in range(len(logits)):
            Y = A[b]@V[b].flatten(1).T                                                      # (4)
            for i in range(h*w):
                if near[b, i] == 254 or (released and near[b, i] != 255): continue
                y, q = Y[i].softmax(0), P[b].flatten(1)[:, i].softmax(0)                    # (5), (6)
                distances.append((y-q).abs().sum())                                         # (7)
        total = total+torch.stack(distances).mean()
    return total if released else total/len(maps)


@pytest.fixture(scope='module')
def case():
    torch.manual_seed(0)
    model = create_segmenter('segformer_mit_b0', 5, decoder_dim=16, last_stride=1).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 64, 64)).where(torch.rand(2, 64, 64) < .2, 255)
    labels[1, :, 50:] = 254
    return model, x, labels


def test_features_and_maps(case):
    model, x, _ = case
    with AttentionTap(model) as tap: model(x)
    features, maps = plain_mit(x, dict(model.backbone.state_dict()))
    for a, b in zip(model.backbone(x), features, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for layers, b in zip(tap.blocks.values(), maps, strict=True):
        torch.testing.assert_close(attention_map(layers).double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('form', ['paper', 'released'])
def test_loss_and_gradients(case, form):
    model, x, labels = case
    model = model.float()                       # as it is trained, against float64
    form = dict(paper=PAPER, released=RELEASED)[form]
    with AttentionTap(model) as tap: logits = model(x.float())
    ours = combine(affinity_loss(tap.blocks, logits, labels, form), form.over_blocks)
    names = [n for n, p in model.backbone.named_parameters() if '.q.' in n or '.kv.' in n]
    own = dict(model.backbone.named_parameters())
    grads = torch.autograd.grad(ours, [x, logits, *(own[n] for n in names)])
    p = {k: v.detach().double().requires_grad_() for k, v in own.items()}
    features, maps = plain_mit(x, p)
    z = model.double().decoder(features)
    theirs = plain_loss(features, maps, z, labels, form is RELEASED)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    for a, b in zip(grads, torch.autograd.grad(theirs, [x, z, *(p[n] for n in names)])):
        assert (a.double()-b).norm() <= 1e-5*b.norm()+1e-9


def test_cross_entropy_at_the_resolution_of_the_scores(case):
    "Labels shrunk by taking every fourth: about one labelled pixel in sixteen counts"
    labels = case[2]
    logits = torch.randn(2, 5, 16, 16)
    small = labels[:, ::4, ::4]
    expected = torch.stack([-logits[b, :, i, j].log_softmax(0)[small[b, i, j]]
                            for b, i, j in (small < 254).nonzero()]).mean()
    torch.testing.assert_close(PartialCrossEntropy(at='scores')(logits, labels), expected)


def test_directions_of_kl():
    from sasformer.sasformer import DISTANCES
    y, p = (torch.rand(3, 4).softmax(-1) for _ in range(2))
    kl = lambda a, b: torch.nn.functional.kl_div(b.log(), a, reduction='none').sum(-1)   # KL(a ‖ b)
    torch.testing.assert_close(DISTANCES['KL'](y, p), kl(y, p))
    torch.testing.assert_close(DISTANCES['reverse_KL'](y, p), kl(p, y))


def test_evaluation_stretched_with_scores_summed():
    "One image, one scale, one mirror after the other, with nothing but the network"
    from sasformer.inference import multi_scale_logits, predict_image
    torch.manual_seed(1)
    model, scales = create_segmenter('segformer_mit_b0', 5, decoder_dim=16, last_stride=1).eval(), (.3, .5)
    x, total = torch.randn(1, 3, 60, 90), 0
    square = F.interpolate(x, (512, 512), mode='bicubic', align_corners=False)
    for side in (153, 256):   # 0.3·512 is 153.6, cut off
        for mirrored in (False, True):
            seen = F.interpolate(square, (side, side), mode='bilinear', align_corners=True)
            with torch.no_grad(): y = model(seen.flip(3) if mirrored else seen)
            y = F.interpolate(y, (512, 512), mode='bilinear', align_corners=True)
            total = total+(y.flip(3) if mirrored else y)
    expected = F.interpolate(total, (60, 90), mode='bicubic', align_corners=False)
    torch.testing.assert_close(multi_scale_logits(model, x, scales, form='released'), expected, rtol=1e-4, atol=1e-4)
    image = torch.randint(0, 255, (60, 90, 3), dtype=torch.uint8).numpy()
    assert predict_image(model, image, scales, form='released').shape == (60, 90)
