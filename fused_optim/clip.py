"""The public path of fused_optim.recipes.clip."""

from .recipes.clip import clip_grad_norm_ as clip_grad_norm_
from .recipes.clip import release_captured as release_captured
