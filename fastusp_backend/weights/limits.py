"""How large model files' headers, and what they say, may be: generous for any model, small enough to be read at once
wherever a file comes from. Others are refused before anything is made of them: a few bytes of a header can ask for
hours, or for all memory.

The functions raise TooLarge, to which `header` adds the file's name.
"""

LONGEST_HEADER = 16 << 20
"""Bytes. Models have up to some MB, most of it metadata."""
MOST_TENSORS = 50_000
"""Models have up to some thousands, all-in-one files with scales among them."""
MOST_METADATA_VALUES = 1_000_000
"""GGUF: strings in arrays count too, and language models list their 100,000s of tokens there."""
DEEPEST_ARRAYS = 4
"""GGUF: arrays within arrays of metadata."""
LONGEST_MARK = 4096
"""Bytes of a `comfy_quant` tensor, which has some tens."""
MOST_BLOCKS = 200
"""Blocks of one kind; models have up to 60."""
WIDEST_MATRIX = 1 << 24
"""Rows or columns of a matrix; models have up to some 10,000. Products of two such sizes stay numbers of 64 bits."""
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 256
"""Characters; errors quote names."""


class TooLarge(ValueError):
    """The file may well be whole: downloading it again would not help. The text goes on from the file's name."""


def check_length(size: int) -> None:
    if size > LONGEST_HEADER:
        raise TooLarge(f"has a header of {size} bytes, FastUSP reads up to {LONGEST_HEADER}")


def check_count(count: int) -> None:
    if count > MOST_TENSORS:
        raise TooLarge(f"has {count} tensors, FastUSP reads up to {MOST_TENSORS}")


def check_dimensions(name: str, count: int) -> None:
    if count > _MOST_DIMENSIONS:
        raise TooLarge(f"has a tensor of {count} dimensions, {name!r}, FastUSP reads up to {_MOST_DIMENSIONS}")


def check_name(name: str) -> None:
    if len(name) > _LONGEST_NAME:
        raise TooLarge(
            f"has a tensor name of {len(name)} characters, {name[:40]!r}..., FastUSP reads up to {_LONGEST_NAME}"
        )
