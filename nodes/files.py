"""The model files that USP Loader offers, and which of them a value of its list means.

Plain names are those of models/diffusion_models (and models/unet), `name [checkpoints]` one in models/checkpoints: no
file name that ComfyUI lists ends like that.
"""

from collections.abc import Iterable

from .comfyui import folder_paths

_MARK = " [checkpoints]"
_GGUF = "diffusion_models_gguf"
_FORMATS = (".safetensors", ".sft", ".gguf")


def model_names() -> list[str]:
    """Diffusion models in the formats that FastUSP reads, GGUF files among them, which ComfyUI's own list leaves out,
    then all-in-one checkpoints."""
    if _GGUF not in folder_paths.folder_names_and_paths:
        paths = folder_paths.folder_names_and_paths["diffusion_models"][0]  # shared: folders that are added later count
        folder_paths.folder_names_and_paths[_GGUF] = (paths, {".gguf"})
    own = {*folder_paths.get_filename_list("diffusion_models"), *folder_paths.get_filename_list(_GGUF)}
    whole = [name + _MARK for name in _readable(folder_paths.get_filename_list("checkpoints"))]
    return sorted(_readable(own)) + whole


def _readable(names: Iterable[str]) -> list[str]:
    """The files whose formats FastUSP reads: no pickles."""
    return [name for name in names if name.lower().endswith(_FORMATS)]


def model_path(name: str) -> str | None:
    """The file that a value of `model_names` means; None where there is none."""
    folder = "checkpoints" if name.endswith(_MARK) else "diffusion_models"
    return folder_paths.get_full_path(folder, name.removesuffix(_MARK))
