"""Changes around and inside a model, made as other packs make them, for one sampling run. changed.py has the nodes."""

import contextlib
import cProfile
import functools
import inspect
import unittest.mock

import comfy.k_diffusion.sampling as k_diffusion
import comfy.k_diffusion.utils
import comfy.ldm.flux.math
import comfy.ldm.flux.model
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import latent_preview
import torch


@contextlib.contextmanager
def replaced(owner, name, make):
    """`owner.name` is make(original) meanwhile."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if own or isinstance(owner, type):
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def scaled(original):
    """Its result, changed a little; it hides behind the original's name."""

    @functools.wraps(original)
    def function(*args, **kwargs):
        return original(*args, **kwargs) * 1.01

    return function


def early(original):
    """A forward that sees a smaller timestep (as sampler nodes do it for detail)."""

    def forward(x, timestep, *args, **kwargs):
        return original(x, timestep * 0.97, *args, **kwargs)

    return forward


class _Halved:
    """A callable that is no function."""

    def __init__(self, original):
        self.original = original

    def __call__(self, *args, **kwargs):
        return self.original(*args, **kwargs) * 1.01


@contextlib.contextmanager
def hooked(module):
    hook = module.register_forward_hook(lambda _module, _args, output: output * 1.01)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def other_default(function, value):
    function = inspect.unwrap(function)
    original = function.__defaults__
    function.__defaults__ = (*original[:3], value, *original[4:])
    try:
        yield
    finally:
        function.__defaults__ = original


@contextlib.contextmanager
def profiled():
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        yield
    finally:
        profiler.disable()
        assert profiler.getstats()


def writing(original):
    """Callbacks that write to the latents which they are shown."""

    def prepare_callback(*args, **kwargs):
        callback = original(*args, **kwargs)

        def write(step, x0, x, total_steps):
            callback(step, x0, x, total_steps)
            x.mul_(1.01)

        return write

    return prepare_callback


def same(original):
    return lambda *args, **kwargs: original(*args, **kwargs)


@contextlib.contextmanager
def as_pulid_does(model):
    model.diffusion_model.pulid_ca = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model.diffusion_model.forward_orig = scaled
    yield


@contextlib.contextmanager
def evaluating(model):
    model.diffusion_model.eval().requires_grad_(False)
    model.eval()
    yield


def mocked(model):
    return unittest.mock.patch.multiple(model.diffusion_model, forward_orig=scaled)


class _MyFlux(comfy.ldm.flux.model.Flux):
    pass


CHANGES = {
    "forward": lambda m: replaced(m.diffusion_model, "forward", early),
    "forward hook": lambda m: hooked(m.diffusion_model),
    "apply_model": lambda m: replaced(m, "apply_model", scaled),
    "apply_model, no function": lambda m: replaced(m, "apply_model", _Halved),
    "apply_model, partial": lambda m: replaced(m, "apply_model", functools.partial),
    "model_sampling": lambda m: replaced(m.model_sampling, "calculate_denoised", scaled),
    "timestep": lambda m: replaced(m.model_sampling, "timestep", lambda original: lambda s: original(s) * 1.0),
    "cfg_function": lambda m: replaced(comfy.samplers, "cfg_function", scaled),
    "sampling_function": lambda m: replaced(comfy.samplers, "sampling_function", scaled),
    "CFGGuider": lambda m: replaced(comfy.samplers.CFGGuider, "predict_noise", scaled),
    "to_d": lambda m: replaced(k_diffusion, "to_d", scaled),
    "sample_euler": lambda m: replaced(k_diffusion, "sample_euler", scaled),
    "stock's forward_orig": lambda m: replaced(comfy.ldm.flux.model.Flux, "forward_orig", scaled),
    "stock's blocks": lambda m: replaced(comfy.ldm.flux.model, "DoubleStreamBlock", lambda original: _MyFlux),
    "forward_orig": lambda m: replaced(m.diffusion_model, "forward_orig", scaled),
    "set forward_orig": lambda m: setattr(m.diffusion_model, "forward_orig", scaled),
    "set blocks": lambda m: setattr(m.diffusion_model, "double_blocks", torch.nn.ModuleList()),
    "set class": lambda m: setattr(m.diffusion_model, "__class__", _MyFlux),
    "set of the class": lambda m: setattr(type(m.diffusion_model), "forward_orig", scaled),
    "add module": lambda m: m.diffusion_model.add_module("double_blocks", torch.nn.ModuleList()),
    "as PuLID": as_pulid_does,
    "mock": mocked,
    "noise_scaling": lambda m: replaced(m.model_sampling, "noise_scaling", scaled),
    "CONST.noise_scaling": lambda m: replaced(comfy.model_sampling.CONST, "noise_scaling", scaled),
    "append_dims": lambda m: replaced(comfy.k_diffusion.utils, "append_dims", scaled),
    "eta": lambda m: other_default(k_diffusion.sample_euler_ancestral, 0.2),
    "callback": lambda m: replaced(latent_preview, "prepare_callback", writing),
    "profiler": lambda m: profiled(),
    "eval": evaluating,
    "get_torch_device": lambda m: replaced(comfy.model_management, "get_torch_device", same),
    "get_free_memory": lambda m: replaced(comfy.model_management, "get_free_memory", same),
    "other models' blocks": lambda m: replaced(comfy.ldm.modules.attention.BasicTransformerBlock, "forward", scaled),
    "attention": lambda m: replaced(comfy.ldm.flux.math, "optimized_attention", same),
    "note on the transformer": lambda m: setattr(m.diffusion_model, "test_note", 1) or contextlib.nullcontext(),
}
