"""An older public path of fused_optim.decay.Decoupled."""

from .optim.decay import CONVENTIONS as CONVENTIONS
from .optim.decay import Decoupled as Decoupled
