"""Which functions of the host are still those of its files, and whose the others are.

Packs change ComfyUI by putting functions of their own in its modules, classes and instances. A function's name and
`__module__` prove nothing (`functools.wraps` copies them); its code does: Python keeps, and compares, what it compiled.
So a function is an original where the file of its module, compiled anew, holds that code under that name.

`reachable.py` beside this file says which functions another one reaches.
"""

import functools
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from os.path import dirname, join, sep
from types import CodeType, FunctionType, MethodType, ModuleType

import torch

from .comfyui import folder_paths, samplers

COMFY = dirname(samplers.__file__) + sep
OWN = dirname(dirname(__file__)) + sep
TORCH = dirname(torch.__file__) + sep
_ROOT = dirname(dirname(samplers.__file__)) + sep
_STDLIB = sysconfig.get_paths()["stdlib"] + sep
_INSTALLED = ("site-packages", "dist-packages")


@functools.cache
def codes(module: ModuleType) -> dict[CodeType, str]:
    """All code that a module's file compiles to, with qualified names such as `KSAMPLER.sample.<locals>.k_callback`; a
    class's body is `KSAMPLER.<class>`, the module's own is `<module>`. Empty where no file can be compiled."""
    return dict(_compiled(module))


def _compiled(module: ModuleType) -> Iterator[tuple[CodeType, str]]:
    def walk(code: CodeType, prefix: str) -> Iterator[tuple[CodeType, str]]:
        for constant in code.co_consts:
            if not isinstance(constant, CodeType):
                continue
            name = prefix + constant.co_name
            if constant.co_flags & inspect.CO_OPTIMIZED:
                yield constant, name
                yield from walk(constant, f"{name}.<locals>.")
            else:
                yield constant, f"{name}.<class>"
                yield from walk(constant, f"{name}.")

    try:
        own = module.__spec__.loader.get_code(module.__name__)
    except (AttributeError, ImportError, OSError, SyntaxError, ValueError):
        own = None  # made by hand, gone, or changed while ComfyUI runs
    if own is not None:  # else an extension module
        yield own, "<module>"
        yield from walk(own, "")


@functools.cache
def names(module: ModuleType) -> frozenset[str]:
    """The qualified names of `codes`."""
    return frozenset(codes(module).values())


def is_original(module: ModuleType, name: str) -> bool:
    """Whether what stands at a qualified name of a module is the function that its file has there."""
    found = module
    for part in name.split("."):
        try:
            found = inspect.getattr_static(found, part)
        except AttributeError:
            return False
    function = function_of(found)
    return (
        function is not None and function.__globals__ is vars(module) and codes(module).get(function.__code__) == name
    )


def function_of(value: object) -> FunctionType | None:
    """The Python function below the decorators of Python, torch and ComfyUI, but a foreign wrapper itself; None for
    what is no Python function, such as `functools.partial`."""
    while True:
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, staticmethod | classmethod | MethodType):
            value = value.__func__
        elif isinstance(value, functools._lru_cache_wrapper):
            value = value.__wrapped__
        elif isinstance(value, FunctionType) and hasattr(value, "__wrapped__") and not is_foreign(value.__code__):
            value = value.__wrapped__
        else:
            return value if isinstance(value, FunctionType) else None


def code_of(value: object) -> CodeType | None:
    function = function_of(value)
    return None if function is None else function.__code__


def leaves_out(replacement: object) -> bool:
    """Whether what runs in a block's place is the function of ComfyUI's nodes for Skip Layer Guidance, which gives the
    tokens back as they came."""
    code = code_of(replacement)
    return code is not None and code.co_name == "skip" and from_extras(code)


def from_extras(code: CodeType) -> bool:
    """Whether code is of ComfyUI's own further nodes."""
    return code.co_filename.startswith(join(_ROOT, "comfy_extras", ""))


def is_foreign(code: CodeType) -> bool:
    """Whether code comes from neither ComfyUI's library, FastUSP, torch nor Python."""
    file = code.co_filename
    return not file.startswith((COMFY, OWN, TORCH)) and not is_python(file)


def is_python(file: str) -> bool:
    """Whether a file is of Python's standard library."""
    return file.startswith("<frozen ") or file.startswith(_STDLIB) and not is_installed(file)


def is_installed(file: str) -> bool:
    """Whether a file is of an installed package."""
    return any(join(sep, folder, "") in file for folder in _INSTALLED)


def pack_of(file: str) -> str | None:
    """The other node pack that a file belongs to; None if it belongs to none."""
    if file.startswith(OWN):
        return None
    for folder in folder_paths.get_folder_paths("custom_nodes"):
        if file.startswith(folder + sep):
            return file.removeprefix(folder + sep).split(sep)[0].removesuffix(".py")
    return None


def file_of(module: ModuleType | None) -> str:
    """A module's file, without waking modules that load themselves when they are asked for something."""
    return getattr(module, "__dict__", {}).get("__file__") or ""


def owner(value: object) -> str:
    """Says whose a function, its code, a class or an instance is, for people: a node pack, else a module or file."""
    if isinstance(value, functools.partial):
        return "functools.partial"  # whoever made it is not to be seen
    code = value if isinstance(value, CodeType) else code_of(value)
    if code is not None:
        file = code.co_filename
        found = next((n for n, m in list(sys.modules.items()) if file_of(m) == file), file)
    else:
        kind = value if isinstance(value, type) else type(value)
        found = kind.__module__
        file = file_of(sys.modules.get(found))
    # ComfyUI's own nodes are loaded under their paths.
    return pack_of(file) or found.removeprefix(_ROOT).removesuffix(".py").replace(sep, ".")


@functools.cache
def packs_naming(text: str) -> list[str]:
    """The other node packs in whose code a text stands."""
    found = set()
    for module in list(sys.modules.values()):
        pack = pack_of(file_of(module))
        if pack is not None and any(text in strings_in(code) for code, _ in _compiled(module)):
            found.add(pack)
    return sorted(found)


def module_of(code: CodeType, scope: dict) -> ModuleType | None:
    """The module of ComfyUI's library in whose globals, `scope`, a function runs."""
    module = sys.modules.get(scope.get("__name__", ""))
    return module if code.co_filename.startswith(COMFY) and getattr(module, "__dict__", None) is scope else None


@functools.cache
def names_in(code: CodeType) -> frozenset[str]:
    """The global and attribute names that code refers to, nested functions included."""
    nested = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*nested)


def strings_in(code: CodeType) -> set[str]:
    """The text constants of code itself, those in constant tuples and sets included."""

    def walk(constants: Iterable) -> Iterator[str]:
        for constant in constants:
            if isinstance(constant, str):
                yield constant
            elif isinstance(constant, tuple | frozenset):
                yield from walk(constant)

    return set(walk(code.co_consts))


def short_name(module: str) -> str:
    """ComfyUI's library goes without saying: a status line is short."""
    return module.removeprefix("comfy.")


def change_of(module: ModuleType, name: str, value: object) -> str:
    """What to say of a function that is not its file's any more, and of what stands there."""
    code = code_of(value)
    if code is not None and code.co_filename == file_of(module) and code.co_name == name.rpartition(".")[2]:
        return f"{short_name(module.__name__)}.{name} is older than its file: restart ComfyUI"
    return f"{owner(value)} changed {short_name(module.__name__)}.{name}"
