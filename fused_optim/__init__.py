"""Drop-in PyTorch optimizers. A step is one pass over memory and, on a GPU, two kernel launches (prepare, update) for
any number of tensors. LAMB adds a pass and three launches, clipping a read of the gradients and two or
three launches."""

from .engine import machine as machine  # first: it refuses a torch that is too old
from .optim.adagrad import FusedAdagrad
from .optim.adam import FusedAdam, FusedAdamW
from .optim.adan import FusedAdan
from .optim.ademamix import FusedAdEMAMix
from .optim.adopt import FusedADOPT
from .optim.base import FusedOptimizer
from .optim.lamb import FusedLAMB
from .optim.lion import FusedLion
from .optim.muon import FusedMuon
from .optim.nadam import FusedNAdam
from .optim.qhadam import FusedQHAdam, FusedQHAdamW
from .optim.radam import FusedRAdam
from .optim.release import GradientRelease, release_gradients
from .optim.schedule_free import FusedScheduleFreeAdamW, FusedScheduleFreeSGD
from .optim.sgd import FusedSGD, FusedSGDW
from .optim.stableadamw import FusedStableAdamW
from .recipes.clip import clip_grad_norm_

__version__ = "0.1.0"
__all__ = [
    "FusedADOPT",
    "FusedAdEMAMix",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedAdan",
    "FusedLAMB",
    "FusedLion",
    "FusedMuon",
    "FusedNAdam",
    "FusedOptimizer",
    "FusedQHAdam",
    "FusedQHAdamW",
    "FusedRAdam",
    "FusedSGD",
    "FusedSGDW",
    "FusedScheduleFreeAdamW",
    "FusedScheduleFreeSGD",
    "FusedStableAdamW",
    "GradientRelease",
    "clip_grad_norm_",
    "release_gradients",
]
