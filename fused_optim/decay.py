"""The public path of fused_optim.recipes.decay."""

from .recipes.decay import Decay as Decay
from .recipes.decay import decoupled as decoupled
