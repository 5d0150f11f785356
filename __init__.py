"""ComfyUI's entry point. Outside ComfyUI (tests, tools, headless workers) importing this does nothing."""

import importlib.util

if importlib.util.find_spec("folder_paths") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
