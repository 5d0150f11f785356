"""USP Optimization Settings: the options of a run, as one value for USP Loader.

`config.Settings` declares an option: its name, values and default, and its place. Here it has its tooltip alone.
"""

from typing import get_args

import msgspec

from ..fastusp_backend.config import Settings
from .comfyui import advanced, io, search_aliases

SettingsType = io.Custom("USP_SETTINGS")

TOOLTIPS = {
    "wire": "What travels between the ranks. exact: the computed values, no loss. fp8, int8: half the bytes, 8 bits "
    "and a scale per token and head, for slow links (PCIe) and long sequences; int8 is mostly the closer one. auto: "
    "int8 where the measured link is slow (most PCIe cards).",
    "attention": "Attention kernel on each rank. auto: the fastest for the device. cudnn, flash (16-bit) and efficient "
    "run on GPUs, flash also on CPU ranks; math is the slow reference and runs everywhere. flash3: on H100 and H200, "
    "with the package fa3-fwd, which auto uses too where it is faster. In 8 bits, only where chosen here: sage, with "
    "the package sageattention, on GPUs from Ampere on; flash3-fp8, with fa3-fwd, on H100 and H200.",
    "compile": "Fuse the element-wise parts, by kernels of our own that Triton compiles. GPUs only; CPU ranks run them "
    "as they are.",
    "cuda_graphs": "Replay a whole evaluation as one CUDA graph, so that no GPU waits for its CPU. GPUs only.",
    "overlap": "Ranks compute on while their exchanges travel. Off: each exchange is awaited at once.",
    "ring_pipeline": "In a ring, the next keys and values travel while the current ones are attended.",
    "linear": "The blocks' matrix products. fp8: faster and half of bf16's memory, 8 bits with a scale per token "
    "and per row of the weights; GPUs from Ada on, in bf16. The picture changes a little.",
    "residency": "Where the weights stay after sampling. keep: on the GPUs, until ComfyUI needs the room. park: in "
    "host memory, shared out over the ranks, and back in the time of a copy. release: nowhere; the next run reads the "
    "file again.",
    "weights": "Where the blocks' weights lie. whole: on every GPU. shared: a part on each, for GPUs that reach each "
    "other's memory; a block comes while the one before it computes, nearly for free over NVLink. host: in the host's "
    "memory, once for all GPUs; several times slower where all come from there. auto: whole where that fits, else as "
    "few blocks as must are fetched in every step. The picture is the same.",
    "cache": "Skip steps whose outcome is almost known. off: none. easy: EasyCache's rule; a step that is skipped "
    "takes no time. first_block: the first block is computed in every step, and tells whether the others must be. The "
    "picture changes, the more the higher cache_threshold is. Works where the loop runs in the workers.",
    "cache_threshold": "How much may have changed since a step was last computed, before one is computed again: 0 "
    "skips nothing. Only with a cache.",
    "cache_start": "Before this share of the steps none is skipped. Only with a cache.",
    "cache_end": "After this share of the steps none is skipped. Only with a cache.",
}
_OPTIONS = msgspec.structs.fields(Settings)
_REQUIRED = {"wire", "attention"}
"""What every saved workflow has; those that came later may lack in one."""
_ADVANCED = {"compile", "cuda_graphs", "overlap", "ring_pipeline", "cache_start", "cache_end"}
"""What is there to measure what each brings or to rule one out, and what is mostly right as it is."""
_LARGEST = {"cache_threshold": 3.0}
"""Numbers end at 1 else."""


def _input(option: msgspec.structs.FieldInfo) -> io.Input:
    if option.type is bool:
        kind, choices = io.Boolean, {}
    elif option.type is float:
        kind, choices = io.Float, {"min": 0.0, "max": _LARGEST.get(option.name, 1.0), "step": 0.01}
    else:
        kind, choices = io.Combo, {"options": list(get_args(option.type))}
    optional = option.name not in _REQUIRED
    choices |= {"default": option.default, "optional": optional, "tooltip": TOOLTIPS[option.name]}
    entry = kind.Input(option.name, **choices)
    return advanced(entry) if option.name in _ADVANCED else entry


class USPSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastUSPSettings",
            display_name="USP Optimization Settings",
            category="FastUSP",
            **search_aliases("multi gpu", "multigpu", "parallel", "compile", "attention"),
            description="Options of the distributed transformer. Connect it to USP Loader; without it the defaults "
            "apply.",
            inputs=[_input(option) for option in _OPTIONS],
            outputs=[SettingsType.Output(display_name="settings", tooltip="Connect to USP Loader.")],
        )

    @classmethod
    def execute(cls, **options) -> io.NodeOutput:
        """options: the inputs, which are the fields of `Settings`; one that is left out has its default."""
        return io.NodeOutput(Settings(**options))
