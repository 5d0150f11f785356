"""ComfyUI's weight patches become those of the workers, or are refused by name."""

import pytest
import torch

from fastusp_backend.errors import FastUSPError
from fastusp_backend.models.synthetic import TINY_FLUX

pytestmark = pytest.mark.unit

KEY, SHAPE = "diffusion_model.img_in.weight", (6, 4)


class Unsupported(FastUSPError):
    pass


class Adapters:
    """Stands for ComfyUI's module: classes, of which an instance has its tensors and numbers in `weights`."""

    class WeightAdapterBase:
        name = "foreign"

        def __init__(self, *weights):
            self.weights = weights


for kind in ("LoRA", "LoHa", "LoKr", "GLoRA", "OFT", "BOFT"):
    setattr(Adapters, f"{kind}Adapter", type(kind, (Adapters.WeightAdapterBase,), {"name": kind.lower()}))


def swap_scale_shift(weight):
    pass


@pytest.fixture
def module(node_module):
    comfyui = {"swap_scale_shift": swap_scale_shift, "weight_adapter": Adapters}
    return node_module("weight_patches", comfyui=comfyui, host={"Unsupported": Unsupported})


def lora(alpha=None, reshape=None, rows=6):
    return Adapters.LoRAAdapter(torch.ones(rows, 2), torch.ones(2, 4), alpha, None, None, reshape)


def test_a_lora_keeps_its_strengths_slice_and_order(module):
    first, second = lora(alpha=8), lora(rows=3)
    entries = [(0.5, first, 1.0, None, None), (2.0, second, 0.25, (0, 3, 3), swap_scale_shift)]
    patches, shapes = module.weight_patches({KEY: entries}, {KEY: SHAPE})
    one, two = patches.weights["img_in.weight"]
    assert shapes == {KEY: SHAPE} and len(patches.tensors) == 4
    assert (one.kind, one.strength, one.strength_model, one.alpha, one.swap_halves) == ("lora", 0.5, 1.0, 8.0, False)
    assert (two.strength, two.strength_model, two.alpha, two.offset, two.swap_halves) == (
        2,
        0.25,
        None,
        (0, 3, 3),
        True,
    )
    assert patches.tensors[one.tensors["up"]] is first.weights[0]
    assert patches.tensors[two.tensors["down"]] is second.weights[1]


def test_what_does_not_fit_is_left_out_and_the_rest_stays(module, caplog):
    entries = [(1.0, lora(rows=5), 1.0, None, None), (1.0, ("set", (torch.ones(6, 4),)), 1.0, None, None)]
    patches, _ = module.weight_patches({KEY: entries, "other": entries[:1]}, {KEY: SHAPE, "other": SHAPE})
    assert [patch.kind for patch in patches.weights["img_in.weight"]] == ["set"] and len(patches.tensors) == 1
    assert patches.weights.keys() == {"img_in.weight"} and "leaves a weight patch out" in caplog.text


@pytest.mark.parametrize(
    "patch, words",
    [
        (Adapters.WeightAdapterBase(), "kind 'foreign'"),
        (lora(alpha="8"), "alpha '8'"),
        (lora(reshape=[6, 0]), "reshape_weight"),
        ([torch.ones(1)], "merging"),
        (("model_as_lora", (torch.ones(1),)), "kind 'model_as_lora'"),
        (lora(reshape=[7, 4]), r"from \(6, 4\) into \(7, 4\)"),
    ],
)
def test_what_workers_cannot_do_is_refused_by_name(module, patch, words):
    with pytest.raises(Unsupported, match=words):
        module.check_supported({KEY: patch}, {KEY: SHAPE}, TINY_FLUX)


def test_foreign_functions_are_refused_by_name(module):
    module.check_supported({(KEY, None, swap_scale_shift): lora()}, {KEY: SHAPE}, TINY_FLUX)
    with pytest.raises(Unsupported, match="function 'len'"):
        module.check_supported({(KEY, None, len): lora()}, {KEY: SHAPE}, TINY_FLUX)
