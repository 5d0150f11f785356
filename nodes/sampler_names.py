"""What the menu calls a sampler: its function's name is often another."""

from .comfyui import samplers


def menu_name(sampler) -> str:
    """Names a SAMPLER. One that is in no menu has its function's name, or its type's."""
    if type(sampler) is not samplers.KSAMPLER:
        return type(sampler).__name__
    function = sampler.sampler_function
    functions = dict(_functions())
    exact = [name for name, known in functions.items() if known is function]
    # ComfyUI makes some of them anew each time, by the same code.
    code = getattr(function, "__code__", None)
    made_alike = [name for name, known in functions.items() if code and getattr(known, "__code__", None) is code]
    if exact or len(made_alike) == 1:
        return (exact or made_alike)[0]
    return getattr(function, "__name__", type(function).__name__).removeprefix("sample_")


def _functions():
    for name in samplers.KSampler.SAMPLERS:
        try:
            yield name, getattr(samplers.sampler_object(name), "sampler_function", None)
        except Exception:  # of any kind: another pack's name that it cannot make a sampler of
            continue
