"""Other libraries' checkpoints and factories."""
