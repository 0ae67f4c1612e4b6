"""Drop-in PyTorch optimizers whose step reads and writes memory once. On a GPU a step is two kernel launches, prepare and
update, for any number of tensors; clipping adds two and LAMB three."""

from .engine import machine as machine  # first: it refuses a torch that is too old
from .optim.adam import FusedAdam, FusedAdamW
from .optim.base import FusedOptimizer
from .optim.lamb import FusedLAMB
from .optim.lion import FusedLion
from .optim.qhadam import FusedQHAdam, FusedQHAdamW
from .optim.sgd import FusedSGD, FusedSGDW
from .recipes.clip import clip_grad_norm_

__version__ = "0.1.0"
__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "FusedLAMB",
    "FusedLion",
    "FusedOptimizer",
    "FusedQHAdam",
    "FusedQHAdamW",
    "FusedSGD",
    "FusedSGDW",
    "clip_grad_norm_",
]
