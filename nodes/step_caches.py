"""ComfyUI's EasyCache and LazyCache on a model: what the workers' loop makes of them.

Both are wrappers around each evaluation, with their settings and what they keep in an object on the model. The loop has
their rules (`sampling.cache`); here is told whether they are ComfyUI's own, and whether a rule says all that they do.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import basename

import torch

from ..fastusp_backend.config import CacheRule
from ..fastusp_backend.sampling.cache import SUBSAMPLED
from .comfyui import WrappersMP
from .provenance import code_of, from_extras

HOLDER = "easycache"
"""Under which both keep their object in the transformer options."""
_WRAPPERS = {
    "easycache": {
        WrappersMP.CALC_COND_BATCH: "easycache_calc_cond_batch_wrapper",
        WrappersMP.DIFFUSION_MODEL: "easycache_forward_wrapper",
    },
    "lazycache": {WrappersMP.PREDICT_NOISE: "lazycache_predict_noise_wrapper"},
}
"""A node's key of its wrappers -> those that run inside a sampler."""


@dataclass(frozen=True, slots=True)
class StepCache:
    """One of the nodes on a model.

    key: of its wrappers.
    holder: its object.
    rule: what it does.
    """

    key: str
    holder: object
    rule: CacheRule

    @contextlib.contextmanager
    def set_aside(self, guider, extra_args: dict) -> Iterator[dict]:
        """Yields a sampler's `extra_args` without the node; the guider is without it meanwhile."""
        given = guider.model_options
        guider.model_options = self._without(given)
        try:
            yield extra_args | {"model_options": self._without(extra_args["model_options"])}
        finally:
            guider.model_options = given

    def _without(self, model_options: dict) -> dict:
        options = model_options["transformer_options"]
        wrappers = {
            kind: {key: listed for key, listed in by_key.items() if key != self.key}
            for kind, by_key in options["wrappers"].items()
        }
        rest = {name: value for name, value in options.items() if name != HOLDER}
        return model_options | {"transformer_options": rest | {"wrappers": wrappers}}

    def tell(self, skipped: int) -> None:
        """So that the node's own line in the log is right."""
        self.holder.total_steps_skipped = skipped


def step_cache(model_options: dict, x: torch.Tensor, *, converted: bool) -> StepCache | None:
    """The one node of these on a model, where a rule says all that it does; None else, also where there is none.

    x: the latents. converted: whether ComfyUI makes other tensors of them for the transformer. Where it does not,
    EasyCache's sum is in the latents themselves, from which the denoised image is taken.
    """
    options = model_options.get("transformer_options", {})
    holder, wrappers = options.get(HOLDER), options.get("wrappers", {})
    keys = [key for key in _WRAPPERS if any(key in by_key for by_key in wrappers.values())]
    if holder is None or len(keys) != 1 or not _is_own(keys[0], wrappers):
        return None
    if (
        holder.verbose
        or holder.subsample_factor != SUBSAMPLED
        or getattr(holder, "output_channels", None) != x.shape[1]
    ):
        return None  # it logs each step, or is of another version
    start, end = torch.tensor([float(holder.start_t), float(holder.end_t)]).tolist()  # compared in float32 there, too
    kind = "lazy" if keys[0] == "lazycache" else "easy" if converted else "easy_in_place"
    return StepCache(keys[0], holder, CacheRule(kind=kind, threshold=holder.reuse_threshold, start=start, end=end))


def _is_own(key: str, wrappers: dict) -> bool:
    """Whether a node's wrappers inside a sampler are once there, and ComfyUI's."""
    for kind, name in _WRAPPERS[key].items():
        codes = [code_of(wrapper) for wrapper in wrappers.get(kind, {}).get(key, ())]
        if len(codes) != 1 or codes[0] is None or codes[0].co_name != name or not from_extras(codes[0]):
            return False
        if basename(codes[0].co_filename) != "nodes_easycache.py":
            return False
    return True
