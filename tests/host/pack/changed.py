"""Nodes that change a model, or what is around it, as other packs do; and notes that change nothing."""

import unittest.mock
from types import FunctionType

import comfy.ldm.flux.model
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_slg

import nodes

from .changes import CHANGES, scaled


class ChangedSampling:
    """KSampler with one of CHANGES in force meanwhile."""

    @classmethod
    def INPUT_TYPES(cls):
        required = nodes.KSampler.INPUT_TYPES()["required"]
        return {"required": {"change": (list(CHANGES),), **required}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"
    CATEGORY = "test"

    def sample(self, change, model, **inputs):
        with CHANGES[change](model.model):
            return nodes.KSampler().sample(model, **inputs)


def _batch(args):
    given = (args[name] for name in ("model", "conds", "input", "sigma", "model_options"))
    return comfy.samplers.calc_cond_batch(*given)


def _two_parts(executor, guider, *args, **kwargs):
    guider.conds = guider.conds | {"positive": guider.conds["positive"] + guider.conds["negative"]}
    return executor(guider, *args, **kwargs)


def _patching(apply_model, given):
    with unittest.mock.patch.object(comfy.ldm.flux.model.DoubleStreamBlock, "forward", scaled):
        return apply_model(given["input"], given["timestep"], **given["c"])


class ChangedModel:
    """A model that carries something for all its runs."""

    @classmethod
    def INPUT_TYPES(cls):
        kinds = ["object patch", "sigmas", "own key", "own option", "function", "read key", "empty", "weight wrapper"]
        kinds += ["two parts", "patched in the run", "unread patches", "batch function", "left out", "refiner patch"]
        return {"required": {"model": ("MODEL",), "change": (kinds,)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "test"

    def patch(self, model, change):
        model = model.clone()
        options = model.model_options
        inner = options.setdefault("transformer_options", {})
        if change == "object patch":
            model.add_object_patch("apply_model", scaled(model.model.apply_model))
        elif change == "sigmas":
            inner["sigmas"] = torch.ones(3)
        elif change == "own key":
            inner["test_pack_settings"] = {"on": True}
        elif change == "own option":
            options["test_pack_option"] = 3
        elif change == "function":
            options["sampler_post_cfg_function"] = [lambda args: args["denoised"] * 1.01]
        elif change == "read key":
            inner["patches_replace"] = {"test": {}, "dit": {("double_block", 0): None}}
        elif change == "empty":
            inner["patches"] = {}
            options["sampler_post_cfg_function"] = []
        elif change == "batch function":
            options["sampler_calc_cond_batch_function"] = _batch
        elif change == "two parts":
            model.add_wrapper(WrappersMP.SAMPLER_SAMPLE, _two_parts)
        elif change == "patched in the run":
            model.set_model_unet_function_wrapper(_patching)
        elif change == "left out":
            # For all steps and prompts, by the function of ComfyUI's nodes.
            codes = nodes_slg.SkipLayerGuidanceDiT.execute.__func__.__code__.co_consts
            skip = next(code for code in codes if getattr(code, "co_name", None) == "skip")
            model.set_model_patch_replace(FunctionType(skip, {}), "dit", "double_block", 1)
        elif change == "unread patches":
            model.set_model_attn2_patch(lambda *args: args)
            model.set_model_output_block_patch(lambda *args: args)
        elif change == "refiner patch":
            inner["patches"] = {"noise_refiner": [lambda given: {}]}  # as a ControlNet of Z-Image's
        else:
            model.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight)
        return (model,)


class NotedConditioning:
    """A prompt with a note that nothing reads."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "note"
    CATEGORY = "test"

    def note(self, conditioning):
        return ([[c, {**extra, "test_pack_note": "a cat"}] for c, extra in conditioning],)


class SameFacts:
    """Raises where a model's transformer answers a plain question otherwise than stock's; passes the model on."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "stock": ("MODEL",)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "compare"
    CATEGORY = "test"

    def compare(self, model, stock):
        ours, theirs = model.model.diffusion_model, stock.model.diffusion_model
        plain = (bool, int, float, str, tuple, list, type(None), torch.dtype)
        facts = {n: v for n, v in vars(theirs).items() if not n.startswith("_") and isinstance(v, plain)}
        if hasattr(theirs, "params"):
            facts["params"] = theirs.params
        for name, value in facts.items():
            assert getattr(ours, name) == value, f"{name}: {getattr(ours, name)} is not {value}"
        assert {"in_channels", "out_channels", "dtype", "patch_size"} <= facts.keys(), facts
        for name in ("double_blocks", "transformer_blocks", "nothing_of_the_kind"):
            assert not hasattr(ours, name)
            try:
                getattr(ours, name)
            except AttributeError as error:
                assert "USP Loader" in str(error) and name in str(error), error
        assert sum(p.numel() for p in ours.parameters()) == 0
        assert next(ours.parameters()).dtype == next(theirs.parameters()).dtype
        return (model,)


NODES = {
    "TestChangedSampling": ChangedSampling,
    "TestChangedModel": ChangedModel,
    "TestNotedConditioning": NotedConditioning,
    "TestSameFacts": SameFacts,
}
