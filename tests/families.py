"""One model of each of timm's families under SegFormer's decoder, at square, odd and narrow sizes: what works, what is
refused, what fails. Not a part of `make test`: minutes, and models of several hundred million weights.
python tests/families.py [family …]"""
import sys
import timm, torch
from timm.models import is_model_in_modules
from sasformer.segmenters import create_segmenter, list_segmenters

SIZES = (64, 64), (40, 48), (45, 61), (33, 97)
SMALL = 'tiny', 'nano', 'atto', 'micro', 'femto', 'pico', '_s', '18', '_b0', 'xs', 'lite', '050', 'small'

def tried(name):
    try: model = create_segmenter(f'segformer_{name}', 2, decoder_dim=32).eval()
    except ValueError as e: return f'refused: {e}'
    for size in SIZES:
        try:
            with torch.no_grad(): model(torch.randn(1, 3, *size))
        except Exception as e: return f'FAILS at {size}: {e}'
    return 'works'

if __name__ == '__main__':
    names, failed = [n.removeprefix('segformer_') for n in list_segmenters() if n.startswith('segformer_')], 0
    for family in sys.argv[1:] or timm.list_modules():
        of = [n for n in names if is_model_in_modules(n, (family,))]
        if not of: continue
        small = min(of, key=lambda n: (not any(s in n for s in SMALL), len(n)))
        said = tried(small)
        failed += said.startswith('FAILS')
        print(f'{family}: {small} {said}'[:150], flush=True)
    sys.exit(failed > 0)
