"""The public path of fused_optim.optim.decay."""

from .optim.decay import CONVENTIONS as CONVENTIONS
from .optim.decay import Decay as Decay
from .optim.decay import Decoupled as Decoupled
from .optim.decay import decoupled as decoupled
