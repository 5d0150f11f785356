"""What an attention mask on a prompt does to its text."""

import torch


def masks_nothing(mask: torch.Tensor) -> bool:
    """Whether a text's attention mask has no effect: ComfyUI adds floating-point ones to the attention's scores, as it
    does booleans; integers say which tokens count."""
    adds = mask.is_floating_point() or mask.dtype == torch.bool
    return not mask.any() if adds else bool((mask == 1).all())


def hidden_end(mask: torch.Tensor) -> list[int] | None:
    """How many tokens of each text count by a mask of integers, (B, T), or one that is added to the attention's scores,
    where all others are at the text's end and do not count at all. None for another mask, one that hides a whole text,
    and one of booleans, from which ComfyUI cannot subtract."""
    if mask.ndim != 2 or mask.dtype == torch.bool:
        return None
    counts, hidden = (0, torch.finfo(mask.dtype).min) if mask.is_floating_point() else (1, 0)
    left = mask == counts
    lengths = left.sum(1)
    known = left | (mask <= hidden if mask.is_floating_point() else mask == hidden)
    at_end = left == (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])
    return lengths.tolist() if known.all() and at_end.all() and lengths.all() else None
