"""PyTorch optimizers whose whole step is one pass over memory and one launch."""

from .adam import FusedAdam, FusedAdamW
from .optimizer import FusedOptimizer

__version__ = "0.1.0"
__all__ = ["FusedAdam", "FusedAdamW", "FusedOptimizer"]
