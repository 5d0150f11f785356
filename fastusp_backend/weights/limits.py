"""How large the headers of model files may be: generous for any model, small enough to be read at once wherever a file
comes from. Others are refused before anything is made of them.

Raises ValueError throughout, for `headers` to say which file it is.
"""

LONGEST_HEADER = 16 << 20
"""Bytes. Models have up to some MB, most of it metadata."""
MOST_TENSORS = 50_000
"""Models have up to some thousands, all-in-one files with scales among them."""
MOST_DIMENSIONS = 8
_LONGEST_NAME = 256
"""Characters; errors quote names."""


def check_count(count: int) -> None:
    if count > MOST_TENSORS:
        raise ValueError(f"it has {count} tensors, FastUSP reads files of up to {MOST_TENSORS}")


def check_name(name: str) -> None:
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"the name {name[:40]!r}... has {len(name)} characters, expected up to {_LONGEST_NAME}")
