"""Triton kernels, each in one file with its launcher and its reference in plain torch, which is what CPU ranks run; the
references of packed formats are in weights/gguf_blocks.py and weights/scaled_blocks.py, which know them."""
