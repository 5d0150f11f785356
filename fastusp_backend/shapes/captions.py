"""Captions of one or two shapes: their words, what they mean, and the embeddings that stand for a text encoder's.

    a [small|large] COLOUR SHAPE [on [a] GROUND [background]]
    a [small|large] COLOUR SHAPE at the left|right|top|bottom [on ...]
    a [small|large] COLOUR SHAPE left of|right of|above|below a [small|large] COLOUR SHAPE [on ...]

A text encoder gives each word an embedding that knows its context. So does this: a word's embedding tells the word and
the part of the caption that it is in, so that "red" of the first shape is not "red" of the second.
"""

import math
import re
from dataclasses import dataclass

import torch

from ..errors import RequestError

SIZES = ("small", "", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
KINDS = ("circle", "square", "triangle")
PLACES = ("", "left", "right", "top", "bottom")
RELATIONS = ("left", "right", "above", "below")
GROUNDS = ("white", "grey", "black")

WORDS = ("a", *filter(None, SIZES), *COLOURS, *KINDS, "left", "right", "of", "above", "below", "at", "the", "top")
WORDS += ("bottom", "on", *GROUNDS, "background")
"""The vocabulary. A word's number is its place here, from 1 on."""
GRAMMAR = (
    'one or two shapes, as "a large red circle at the left" or "a small red circle left of a blue square on black"'
)

TOKENS, CONTEXT, POOLED = 16, 4096, 768
"""Tokens of each caption, zeros where it has fewer words, and FLUX.1's widths."""
_FIRST, _BETWEEN, _SECOND, _GROUND = range(4)
_STRIDE = 32


@dataclass(frozen=True, slots=True)
class Caption:
    """Numbers in the tuples above. size, colour, kind: one for each shape. place: where one shape is. relation: of two,
    where the first is from the second. ground: the colour behind them."""

    size: tuple[int, ...]
    colour: tuple[int, ...]
    kind: tuple[int, ...]
    place: int = 0
    relation: int = 0
    ground: int = 0

    @classmethod
    def read(cls, text: str) -> "Caption":
        """Raises RequestError for words that are not in the vocabulary, and for what is no caption."""
        words = re.findall(r"[^\s,.]+", text.lower())
        words = ["a" if word == "an" else "grey" if word == "gray" else word for word in words]
        if unknown := [word for word in words if word not in WORDS]:
            raise RequestError(
                f"Use the demo model's words: {', '.join(WORDS)}. It does not know {', '.join(map(repr, unknown))}"
            )
        found = _CAPTION.fullmatch(" ".join(words))
        if found is None:
            raise RequestError(f"Write {GRAMMAR}, not {text!r}")
        parts = found.groupdict(default="")
        count = 2 if parts["kind2"] else 1
        both = [str(i) for i in range(1, count + 1)]
        return cls(
            tuple(SIZES.index(parts[f"size{i}"]) for i in both),
            tuple(COLOURS.index(parts[f"colour{i}"]) for i in both),
            tuple(KINDS.index(parts[f"kind{i}"]) for i in both),
            place=PLACES.index(parts["place"]),
            relation=RELATIONS.index(parts["relation"].removesuffix(" of")) if count == 2 else 0,
            ground=GROUNDS.index(parts["ground"] or GROUNDS[0]),
        )

    def __str__(self) -> str:
        return " ".join(word for part in self.parts() for word in part if word)

    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The words of the four parts: first shape, what is between, second shape, ground."""
        shapes = [
            ("a", SIZES[size], COLOURS[colour], KINDS[kind])
            for size, colour, kind in zip(self.size, self.colour, self.kind, strict=True)
        ]
        between: tuple[str, ...] = ()
        if len(shapes) == 2:
            relation = RELATIONS[self.relation]
            between = (relation, "of") if relation in ("left", "right") else (relation,)
        elif self.place:
            between = ("at", "the", PLACES[self.place])
        return shapes[0], between, shapes[1] if len(shapes) == 2 else (), ("on", GROUNDS[self.ground])


def _shape(number: int) -> str:
    return (
        rf"a (?:(?P<size{number}>small|large) )?(?P<colour{number}>{'|'.join(COLOURS)}) "
        rf"(?P<kind{number}>{'|'.join(KINDS)})"
    )


_CAPTION = re.compile(
    rf"{_shape(1)}(?: at the (?P<place>left|right|top|bottom)| (?P<relation>left of|right of|above|below) {_shape(2)})?"
    rf"(?: on (?:a )?(?P<ground>{'|'.join(GROUNDS)})(?: background)?)?"
)


def numbers(caption: Caption) -> list[int]:
    """Tells each word's embedding, TOKENS of them: 0 for none."""
    found = [
        part * _STRIDE + WORDS.index(word) + 1 for part, words in enumerate(caption.parts()) for word in words if word
    ]
    return found + [0] * (TOKENS - len(found))


def embed(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (B, TOKENS) int64, as `numbers` -> context (B, TOKENS, CONTEXT) and pooled (B, POOLED), float32.

    A token's embedding is that row of Sylvester's Hadamard matrix, of which any two are orthogonal: the sign at column
    j of row n is that of the parity of the bits that n and j share. Zeros for token 0. The pooled one is the sum of the
    tokens' first columns, by the root of TOKENS.
    """
    column = torch.arange(CONTEXT, device=tokens.device)
    shared = tokens[..., None] & column
    for shift in (4, 2, 1):  # 7 bits are enough for all tokens: their parity
        shared = shared ^ (shared >> shift)
    signs = 1.0 - 2.0 * (shared & 1)
    context = signs * (tokens != 0)[..., None]
    return context, context[..., :POOLED].sum(1) / math.sqrt(TOKENS)
