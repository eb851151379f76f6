"MiT: registration, equality with transformers' SegFormer encoder, checkpoints in every name scheme"
import subprocess, sys
import pytest, timm, torch
from safetensors.torch import save_file
from conftest import KeepPrecision
from sasformer.mit import load_mit_weights, mit_names, mit_sizes

transformers = pytest.importorskip('transformers')


def segformer(name, seed=0, cls='SegformerModel', **kwargs):
    "transformers' encoder with random weights large enough for attention that is far from uniform"
    depths, widths = mit_sizes[name]
    config = transformers.SegformerConfig(depths=depths, hidden_sizes=widths, attn_implementation='eager', **kwargs)
    # no time for an initialisation that is thrown away
    with torch.device('meta'): model = getattr(transformers, cls)(config).eval()
    model.to_empty(device='cpu')
    generator = torch.Generator().manual_seed(seed)
    for n, t in model.state_dict().items():
        if t.dtype == torch.float32:
            bound = 2 * t[0].numel() ** -.5 if t.ndim > 1 else .2
            t.uniform_(-bound, bound, generator=generator)
            if 'norm' in n and n.endswith('weight'): t += 1
    for n, m in model.named_modules():   # the blocks' eps is 1e-6 in the authors' code
        if isinstance(m, torch.nn.LayerNorm) and 'patch_embeddings' not in n and 'sequence_reduction' not in n:
            m.eps = 1e-6
    return model


@pytest.fixture(scope='module')
def encoder(): return segformer('mit_b0')


@pytest.fixture(scope='module')
def state(encoder): return mit_names(encoder.state_dict())[1]


@pytest.mark.parametrize('name, size', [
    *((n, (64, 64)) for n in mit_sizes), ('mit_b0', (75, 97)), ('mit_b1', (75, 97))])
def test_equals_transformers(name, size):
    theirs, maps = segformer(name), []
    with torch.device('meta'): ours = timm.create_model(name, num_classes=0).eval()
    ours.load_state_dict(mit_names(theirs.state_dict())[1], assign=True)
    for stage in ours.stages:
        for layer in stage.blocks:
            layer.attn.fused_attn = False
            layer.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    # rounding is then below all else, anywhere
    theirs, ours, x = theirs.double(), ours.double(), torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad(), KeepPrecision():
        features = ours.forward_intermediates(x, intermediates_only=True)
        out = theirs(x, output_hidden_states=True, output_attentions=True)
    assert len(maps) == sum(mit_sizes[name][0])
    for a, b in zip([*features, *maps], [*out.hidden_states, *out.attentions], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_import_is_quiet():
    code = 'import timm; n = set(timm.list_models()); import sasformer.mit; print(*sorted(set(timm.list_models()) - n))'
    done = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == list(mit_sizes) and not done.stderr, done.stderr


def test_options():
    model = timm.create_model('mit_b0', features_only=True, last_stride=1, drop_path_rate=.1, out_indices=(1, 3))
    assert model.feature_info.reduction() == [8, 16] and model.feature_info.channels() == [64, 256]
    assert [f.shape[-2:] for f in model(torch.randn(1, 3, 64, 96))] == [(8, 12), (4, 6)]
    rates = [getattr(layer.drop_path2, 'drop_prob', 0.) for i in range(4) for layer in model[f'stages_{i}'].blocks]
    assert rates == pytest.approx([.1 * i / 7 for i in range(8)])
    with pytest.raises(ValueError, match='expected 1 or 2'): timm.create_model('mit_b0', last_stride=3)


@pytest.mark.parametrize('wrapped', [False, True])
def test_hugging_face_files(tmp_path, state, wrapped):
    "A whole segmenter and a bare encoder, as transformers writes them"
    for cls in ('SegformerModel', 'SegformerForSemanticSegmentation', 'SegformerForImageClassification'):
        theirs = segformer('mit_b0', cls=cls, num_labels=7)
        theirs.save_pretrained(tmp_path/cls)
        model = timm.create_model('mit_b0', num_classes=7, features_only=wrapped)
        done = load_mit_weights(model, tmp_path/cls)
        expected = mit_names(theirs.state_dict())[1]
        for n, x in model.state_dict().items():
            if not n.startswith('head') or 'Image' in cls:
                assert torch.equal(x, expected[n.replace('stages_', 'stages.')]), n
        assert done.scheme == 'Hugging Face'
        assert bool(done.unused) == ('Semantic' in cls or wrapped and 'Image' in cls)
        assert done.untouched == ([] if wrapped or 'Image' in cls else ['head.weight', 'head.bias'])


def test_pretrained_is_timms_way(tmp_path, encoder, state):
    encoder.save_pretrained(tmp_path)
    overlay = dict(file=str(tmp_path/'model.safetensors'))
    model = timm.create_model('mit_b0', features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(x, state[n.replace('stages_', 'stages.')]) for n, x in model.state_dict().items())
    grey = timm.create_model('mit_b0', num_classes=3, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(grey.patch_embed.proj.weight, state['patch_embed.proj.weight'].sum(1, keepdim=True))
    with pytest.raises(ValueError, match='those of mit_b0'):
        timm.create_model('mit_b1', features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    assert timm.get_pretrained_cfg('mit_b3').hf_hub_id == 'nvidia/mit-b3'


def test_refuses(tmp_path, state):
    model = timm.create_model('mit_b0', num_classes=0)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    save_file({n: x for n, x in state.items() if n != 'stages.1.norm.bias'}, tmp_path/'missing.safetensors')
    save_file(state | {'stages.1.extra': torch.zeros(1)}, tmp_path/'more.safetensors')
    save_file(state | {'stages.1.norm.bias': torch.zeros(3)}, tmp_path/'shape.safetensors')
    (tmp_path/'cut.safetensors').write_bytes((tmp_path/'more.safetensors').read_bytes()[:5000])
    (tmp_path/'text.pth').write_text('no weights')
    torch.save(model, tmp_path/'pickle.pth')
    torch.save(torch.zeros(3), tmp_path/'tensor.pth')
    (tmp_path/'empty').mkdir()
    for file, message in [('missing.safetensors', '1 missing: stages.1.norm.bias'),
                          ('more.safetensors', '1 unexpected: stages.1.extra'),
                          ('shape.safetensors', r'stages.1.norm.bias is \(3,\), expected \(64,\)'),
                          ('cut.safetensors', 'cannot be read'),
                          ('text.pth', 'cannot be read'), ('pickle.pth', 'cannot be read'),
                          ('tensor.pth', 'cannot be read'),
                          ('empty', 'expected model.safetensors'), ('none.pth', 'no such file')]:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as e: load_mit_weights(model, tmp_path/file)
        assert file in str(e.value)
    with pytest.raises(TypeError, match='is no MiT'):
        load_mit_weights(timm.create_model('resnet18'), tmp_path/'more.safetensors')
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_real_weights(data_dir):
    file = data_dir/'weights'/'mit_b0_tinyimagenet64.safetensors'
    if not file.is_file(): pytest.skip('no pretrained MiT-B0 in SASFORMER_DATA')
    done = load_mit_weights(timm.create_model('mit_b0', features_only=True, last_stride=1), file)
    assert done == ('timm', [], [])
    with pytest.raises(ValueError, match='The file holds mit_b0, the model is mit_b2'):
        load_mit_weights(timm.create_model('mit_b2'), file)
