"""The public path of fused_optim.recipes.lr_finder."""

from .recipes.lr_finder import RangeTest as RangeTest
from .recipes.lr_finder import lr_range_test as lr_range_test
from .recipes.lr_finder import put_back as put_back
