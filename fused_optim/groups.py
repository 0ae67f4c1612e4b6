"""The public path of fused_optim.recipes.groups."""

from .recipes.groups import EMBEDDINGS as EMBEDDINGS
from .recipes.groups import HEADS as HEADS
from .recipes.groups import NORMS as NORMS
from .recipes.groups import Group as Group
from .recipes.groups import depths as depths
from .recipes.groups import layers as layers
from .recipes.groups import layerwise as layerwise
from .recipes.groups import muon as muon
from .recipes.groups import named_group as named_group
from .recipes.groups import no_decay as no_decay
from .recipes.groups import output_layers as output_layers
from .recipes.groups import per_group as per_group
from .recipes.groups import split as split
