"""USP Optimization Settings: the options of a run, as one value for USP Loader."""

from typing import get_args

from comfy_api.latest import io

from ..fastusp_backend.config import AttentionChoice, Settings, WireChoice

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
                    tooltip="What travels between the ranks. exact: the computed values as they are, no loss.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(get_args(AttentionChoice)),
                    default="auto",
                    tooltip="Attention kernel on each rank. auto: the fastest for the device. cudnn, flash (16-bit) "
                    "and "
                    "efficient run on GPUs, flash also on CPU ranks; math is the slow reference and runs everywhere.",
                ),
                io.Boolean.Input(
                    "compile",
                    optional=True,
                    default=True,
                    tooltip="Fuse the element-wise parts by torch.compile. GPUs only; CPU ranks run them as they are.",
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
            ],
            outputs=[SettingsType.Output(display_name="settings", tooltip="Connect to USP Loader.")],
        )

    @classmethod
    def execute(
        cls, wire: str, attention: str, compile: bool = True, cuda_graphs: bool = True, overlap: bool = True
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Settings(wire=wire, attention=attention, compile=compile, cuda_graphs=cuda_graphs, overlap=overlap)
        )
