"""Which types a model is stored and computed in, by its file's types and what is asked for."""

from collections import Counter
from math import prod

import torch

from ..config import Storage
from .tensor_info import TensorInfo


def main_dtype(header: dict[str, TensorInfo]) -> torch.dtype:
    """Returns the type of most of the values; packed ones count as float32."""
    counts = Counter()
    for info in header.values():
        counts[info.dtype] += prod(info.shape)
    return counts.most_common(1)[0][0]


def choose_types(storage: Storage | None, file_dtype: torch.dtype, *, cpu: bool, bfloat16: bool, float16: bool) -> dict:
    """ModelSpec's types for a wished storage type (None: the default) and a file of mostly `file_dtype`.

    CPU ranks compute in float32, as ComfyUI does on a CPU. GPUs compute in the storage type, which by default is the
    file's; float32 files are stored, as ComfyUI stores them, in 16 bits unless float32 is asked for. Where a model does
    not compute in float16 or a GPU in bfloat16 (the flags), the other type computes. Weights that are in fp8 or packed,
    and by default stay so, are converted as they are used.
    """
    if cpu:
        return {"storage": storage, "compute": "float32"}
    default = storage is None
    if default:
        storage = "float16" if file_dtype == torch.float16 or not bfloat16 else "bfloat16"
    compute = "bfloat16" if storage.startswith("float8") else storage
    if compute == "bfloat16" and not bfloat16:
        compute = "float16" if float16 else "float32"
    elif compute == "float16" and not float16:
        compute = "bfloat16" if bfloat16 else "float32"
    return {"storage": storage, "compute": compute, "keep_quantised": default}
