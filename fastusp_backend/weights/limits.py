"""How large the headers of model files may be: generous for any model, small enough to be read at once wherever a file
comes from. Others are refused before anything is made of them. Here is what both formats share; what one of them alone
bounds, or a model, stands where that is read.

Raises TooLarge throughout, for `headers` to say which file it is.
"""

LONGEST_HEADER = 16 << 20
"""Bytes. Models have up to some MB, most of it metadata."""
MOST_TENSORS = 50_000
"""Models have up to some thousands, all-in-one files with scales among them."""
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 256
"""Characters; errors quote names."""


class TooLarge(ValueError):
    """Of a file that may well be whole: downloading it again would not help. The text goes on from the file's name."""


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
