"""Converts checkpoints of other libraries and registers the classes with timm."""
