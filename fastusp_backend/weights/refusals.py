"""How files are refused whose quantisation FastUSP does not read, or which lack a part of it."""

from ..errors import CheckpointError
from .tensor_info import TensorInfo

READS = "bf16, fp16, fp32, fp8 (e4m3fn, e5m2), scaled fp8, nvfp4, mxfp8, convrot_w4a4, int8 and GGUF"
_LONGEST_FORM = 100
"""Characters that an error quotes of a format's name."""


def type_of(info: TensorInfo) -> str:
    """The name of a tensor's type, for people."""
    return info.unknown or info.packing or str(info.dtype).removeprefix("torch.")


def refusal(path: str, kind: str, where: str) -> CheckpointError:
    """kind: the quantisation, as its file names it. where: a tensor or layer that has it."""
    kind = kind[:_LONGEST_FORM]
    return CheckpointError(
        f"Use a file in another format: {path} is quantised as {kind} ({where!r}), which FastUSP does not read; it "
        f"reads {READS}"
    )


def lacks(path: str, form: str, scale: str) -> CheckpointError:
    """Of a file in a format that needs a tensor which it has not."""
    return CheckpointError(
        f"Download {path} again, or use another file: it is an incomplete {form} file, without tensor {scale!r}"
    )


def contradicts(path: str, layer: str, form: str, weight: TensorInfo) -> CheckpointError:
    """Of a layer that is no layer of its format, by the type of its weight."""
    what = weight.unknown or weight.packing or weight.dtype
    return CheckpointError(f"{path}: {layer!r} is said to be {form}, but its weight is {what} {weight.shape}")
