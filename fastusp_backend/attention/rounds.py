"""Which queries of FlashAttention-3 are attended in parts of the keys, where a round of tiles would leave most of a GPU
idle and parts were measured to take less.

A tile is 128 queries of one head, which one multiprocessor attends from the first key to the last. So many tiles as the
GPU has multiprocessors are a round, and a last round that is nearly empty takes as long as a full one: 4608 queries of
12 heads on 132 multiprocessors are 3.27 rounds and take 4. If the queries of the last tiles attend to parts of the keys
each, those parts fill a shorter round, and the kernel joins them by their log-sum-exp, in float32 (Flash-Decoding's
split-KV). It costs what the parts write and what joins them reads. (Parts are of whole tiles of keys, 176 each or 224
in e4m3, so that some are longer than others; the rule counts them as if they were not.)
"""

import functools
import math

_TILE = 128
_MOST_PARTS = 8
_CALL, _PART = 400, 5
"""What a second call and the joining cost, and each part of a tile, as keys that a round would attend in the time. On
an H200, us, heads x queries, tiles of each head as they are + in parts: 12 x 4608 in 33 + 3, 3 and 7 parts, 211 and 212
for 241; 6 x 4608 in 22 + 14, 3 and 6 parts, 120 and 139 for 114; 24 x 4608 in 33 + 3, 5 parts, 430 for 423; 12 x
2048 of 4608 in 11 + 5, 2 parts, 105 for 118; 12 x 4352 in 33 + 1, 8 parts, 181 for 225; 12 x 8704 of 16896 in 66 + 2, 5
parts, 1300 for 1420. Of these, those that gain, in e4m3: 160 for 173, 80 for 88, 142 for 166 and 998 for 1091."""
_GAIN = 0.95
"""Of the time in one call, that parts must take less than. With bf16 on an H200, like all of these: an H100 has as many
multiprocessors of the same kind."""


@functools.cache
def split(queries: int, keys: int, heads: int, units: int) -> tuple[int, int]:
    """Returns how many of so many queries are attended as they are, and in how many parts of the keys the others;
    (queries, 1) where that would gain nothing.

    heads: of all images. units: the GPU's multiprocessors.
    """
    rows = -(-queries // _TILE)

    def rounds(tiles: int, parts: int = 1) -> float:
        return math.ceil(tiles * parts / units) / parts

    best, least = (queries, 1), _GAIN * keys * rounds(rows * heads)
    for whole in range(rows):
        rest = (rows - whole) * heads
        for parts in range(2, _MOST_PARTS + 1):
            cost = keys * (rounds(whole * heads) + rounds(rest, parts)) + _CALL + _PART * rest * parts
            if cost < least:
                best, least = (whole * _TILE, parts), cost
    return best
