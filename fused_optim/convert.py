"""The public path of fused_optim.interop.convert."""

from .interop.convert import apex as apex
from .interop.convert import bitsandbytes as bitsandbytes
from .interop.convert import deepspeed as deepspeed
from .interop.convert import dequantized as dequantized
from .interop.convert import optimi as optimi
from .interop.convert import to_schedulefree as to_schedulefree
from .interop.convert import to_torch as to_torch
from .interop.convert_masters import flashoptim as flashoptim
from .interop.convert_masters import flashoptim_values as flashoptim_values
from .interop.convert_masters import transformer_engine as transformer_engine
