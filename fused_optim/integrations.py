"""The public path of fused_optim.interop.timm."""

from .interop.timm import register_timm as register_timm
