"""What a rank is at, and what it says when its memory does not suffice."""

import re

from ..comm.groups import is_out_of_memory

LOADING = "while it loaded the model"
PATCHING = "while it patched the weights"
PREPARING = "while it made room for an evaluation"
PARKING = "while it parked the weights"
EVALUATING = "while it evaluated the model"
RECEIVING = "while it took in a request"
WAITING = "while it waited for a request"

_ADVICE = {
    LOADING: "Free memory on its device (other programs; ComfyUI's models: Unload Models), or use a smaller file or "
    "weight_dtype, or set weights to shared or host in USP Optimization Settings",
    PREPARING: "Use a smaller image or batch, or more GPUs, or set weights to shared or host in USP Optimization "
    "Settings; cuda_graphs = off there saves a graph's memory",
}
_ADVICE[PATCHING] = _ADVICE[LOADING]
_ADVICE[PARKING] = "Set residency to keep or release in USP Optimization Settings"
_ADVICE[EVALUATING] = _ADVICE[RECEIVING] = _ADVICE[PREPARING]


def out_of_memory_in(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that says it."""
    while error is not None and not is_out_of_memory(error):
        error = error.__cause__
    return error


def explain(error: BaseException, doing: str, held: str) -> str:
    """What was asked for, what the rank held, and what helps. doing: one of the above."""
    asked = re.search(r"(?:tried to allocate|unable to mmap) ([\d.]+ \w+)", str(error), re.IGNORECASE)
    what = f"it asked for {asked[1]}" if asked else str(error)
    return f"{doing}: {what}; it had {held}. {_ADVICE[doing]}"
