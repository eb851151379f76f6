__version__ = "0.1.0"

import warnings
# timm and fastai still use it at import; the words say nothing to our users
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)
