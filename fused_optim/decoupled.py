"""The public path of fused_optim.optim.decoupled."""

from .optim.decoupled import CONVENTIONS as CONVENTIONS
from .optim.decoupled import Decoupled as Decoupled
