"""What runs in the worker processes. Entry points: `launch` (torchrun) and `__main__` (one rank)."""
