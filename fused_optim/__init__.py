"""PyTorch optimizers whose whole step is one pass over memory and one launch."""

from . import machine as machine  # first: it refuses a torch that is too old
from .adam import FusedAdam, FusedAdamW
from .clip import clip_grad_norm_
from .lamb import FusedLAMB
from .lion import FusedLion
from .optimizer import FusedOptimizer
from .qhadam import FusedQHAdam, FusedQHAdamW
from .sgd import FusedSGD, FusedSGDW

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
