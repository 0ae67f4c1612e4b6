"""The optimizers and their base class."""
