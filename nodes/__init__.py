"""The nodes, and everything else that touches ComfyUI. Nothing outside this folder imports the host."""

from . import control, memory, planning, status, watching
from .comfyui import ComfyExtension, io
from .demo import USPDemoDecode, USPDemoPrompt, offer_model
from .loader import USPLoader
from .measuring import USPMeasure
from .sampler import USPSampler
from .settings import USPSettings


class FastUSPExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [USPLoader, USPMeasure, USPSampler, USPSettings, USPDemoPrompt, USPDemoDecode]


async def comfy_entrypoint() -> ComfyExtension:
    status.add_routes()
    control.add_routes()
    planning.add_routes()
    watching.add_routes()
    offer_model()
    memory.weights.follow_unload_all()
    return FastUSPExtension()
