"""FastUSP: one image, sampled by all the GPUs of a machine.

The backend knows nothing of ComfyUI. `pool` starts and talks to worker processes, `worker` is what runs in them.
"""

__version__ = "0.1.0"
