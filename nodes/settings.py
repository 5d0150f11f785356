"""USP Optimization Settings: the options of a run, as one value for USP Loader."""

from typing import get_args

from ..fastusp_backend.config import AttentionChoice, LinearChoice, Residency, Settings, WireChoice
from .comfyui import io

SettingsType = io.Custom("USP_SETTINGS")


class USPSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastUSPSettings",
            display_name="USP Optimization Settings",
            category="FastUSP",
            description="Options of the distributed transformer. Connect it to USP Loader; without it the defaults "
            "apply.",
            inputs=[
                io.Combo.Input(
                    "wire",
                    options=list(get_args(WireChoice)),
                    default="exact",
                    tooltip="What travels between the ranks. exact: the computed values, no loss. fp8, int8: half the "
                    "bytes, 8 bits and a scale per token and head, for slow links (PCIe) and long sequences; int8 is "
                    "mostly the closer one. auto: int8 where the measured link is slow.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(get_args(AttentionChoice)),
                    default="auto",
                    tooltip="Attention kernel on each rank. auto: the fastest for the device. cudnn, flash (16-bit) "
                    "and efficient run on GPUs, flash also on CPU ranks; math is the slow reference and runs "
                    "everywhere.",
                ),
                io.Boolean.Input(
                    "compile",
                    optional=True,
                    default=True,
                    tooltip="Fuse the element-wise parts, by kernels of our own and torch.compile. GPUs only; CPU "
                    "ranks run them as they are.",
                ),
                io.Boolean.Input(
                    "cuda_graphs",
                    optional=True,
                    default=True,
                    tooltip="Replay a whole evaluation as one CUDA graph, so that no GPU waits for its CPU. GPUs only.",
                ),
                io.Boolean.Input(
                    "overlap",
                    optional=True,
                    default=True,
                    tooltip="Ranks compute on while their exchanges travel. Off: each exchange is awaited at once.",
                ),
                io.Boolean.Input(
                    "ring_pipeline",
                    optional=True,
                    default=True,
                    tooltip="In a ring, the next keys and values travel while the current ones are attended.",
                ),
                io.Combo.Input(
                    "linear",
                    options=list(get_args(LinearChoice)),
                    optional=True,
                    default="exact",
                    tooltip="The blocks' matrix products. fp8: faster and half the weights' memory, 8 bits with a "
                    "scale per token and per row of the weights; GPUs from Ada on, in bf16. The picture changes a "
                    "little.",
                ),
                io.Combo.Input(
                    "residency",
                    options=list(get_args(Residency)),
                    optional=True,
                    default="keep",
                    tooltip="Where the weights stay after sampling. keep: on the GPUs, until ComfyUI needs the room. "
                    "park: in host memory, shared out over the ranks, and back in the time of a copy. release: "
                    "nowhere; the next run reads the file again.",
                ),
            ],
            outputs=[SettingsType.Output(display_name="settings", tooltip="Connect to USP Loader.")],
        )

    @classmethod
    def execute(cls, **options) -> io.NodeOutput:
        """options: the inputs, which are the fields of `Settings`; one that is left out has its default."""
        return io.NodeOutput(Settings(**options))
