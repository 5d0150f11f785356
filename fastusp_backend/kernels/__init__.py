"""Triton kernels, each in one file with its launcher and its reference in plain torch, which is what CPU ranks run; the
reference of `packed` is weights/gguf_blocks.py, which knows GGUF's formats."""
