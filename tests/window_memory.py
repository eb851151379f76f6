"""Peak memory of prediction by windows: from the scores of the whole image, and band by band; one process for each row

    python tests/window_memory.py results/window_memory.json
"""
import hashlib, json, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np, torch
from PIL import Image

from sasformer.annotations import allow_megapixels, write_json
from sasformer.inference import image_tensor, multi_scale_logits, predict_folder

ROWS = (2000, 'whole'), (2000, 'bands'), (4000, 'whole'), (4000, 'bands'), (10_000, 'bands, overlay')

def gigabytes(): return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, 2)   # kilobytes on Linux

def measure(side, how):
    "One row: an image of `side`×`side` pixels, 21 classes, windows of 1024 that overlap by a quarter"
    torch.manual_seed(0)
    allow_megapixels(400)
    model, start = torch.nn.Conv2d(3, 21, 3, stride=4, padding=1).eval(), gigabytes()
    with tempfile.TemporaryDirectory() as d:
        photos, out, clock = Path(d)/'photos', Path(d)/'out', time.time()
        photos.mkdir()
        small = np.random.default_rng(0).integers(0, 255, (side//50, side//50, 3), np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(photos/'a.jpg')
        if how == 'whole':
            y = multi_scale_logits(model, image_tensor(photos/'a.jpg', model), (1.,), False, window=1024, overlap=.25)
            ids = y[0].argmax(0).byte().numpy()
        else:
            predict_folder(model, photos, out, window=1024, overlap=.25, overlays='overlay' in how, progress=False)
            peak = gigabytes()
            ids = np.asarray(Image.open(out/'a.png'))
        return {'pixels': f'{side}×{side}', 'scores': how, 'GB at the start': start,
                'GB at the peak': gigabytes() if how == 'whole' else peak, 'seconds': round(time.time()-clock),
                'digest of the mask': hashlib.sha256(ids.tobytes()).hexdigest()[:8]}

if __name__ == '__main__':
    if len(sys.argv) > 2: print(json.dumps(measure(int(sys.argv[1]), sys.argv[2])))
    else:
        rows = []
        for row in ROWS:
            command = [sys.executable, __file__, *map(str, row)]
            rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
            write_json(sys.argv[1], dict(rows=rows, torch=torch.__version__, python=platform.python_version()))
