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
            ],
            outputs=[SettingsType.Output(display_name="settings", tooltip="Connect to USP Loader.")],
        )

    @classmethod
    def execute(cls, wire: str, attention: str) -> io.NodeOutput:
        return io.NodeOutput(Settings(wire=wire, attention=attention))
