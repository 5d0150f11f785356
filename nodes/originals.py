"""Which functions of the host are still those of its files, and who replaced the others.

Packs change ComfyUI by putting functions of their own in its modules, classes and instances. A function's name and
`__module__` prove nothing (`functools.wraps` copies them); its code does: Python keeps, and compares, what it compiled.
So a function is an original where the file of its module, compiled anew, holds that code under that name.
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
_STDLIB = sysconfig.get_paths()["stdlib"] + sep
_INSTALLED = ("site-packages", "dist-packages")


@functools.cache
def codes(module: ModuleType) -> dict[CodeType, str]:
    """All code that a module's file compiles to, with qualified names such as `KSAMPLER.sample.<locals>.k_callback`; a
    class's body is `KSAMPLER.<class>`, the module's own is `<module>`."""
    own = module.__spec__.loader.get_code(module.__name__) if module.__spec__ is not None else None
    if own is None:
        return {}  # an extension module, or made by hand
    found = {own: "<module>"}

    def walk(code: CodeType, prefix: str) -> None:
        for constant in code.co_consts:
            if not isinstance(constant, CodeType):
                continue
            name = prefix + constant.co_name
            if constant.co_flags & inspect.CO_OPTIMIZED:
                found[constant] = name
                walk(constant, f"{name}.<locals>.")
            else:
                found[constant] = f"{name}.<class>"
                walk(constant, f"{name}.")

    walk(own, "")
    return found


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
    code = code_of(found)
    return code is not None and codes(module).get(code) == name


def code_of(value: object) -> CodeType | None:
    """A function's code, below the decorators of Python, torch and ComfyUI, but a foreign wrapper's own; None for what
    is no Python function, such as `functools.partial`."""
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
            return value.__code__ if isinstance(value, FunctionType) else None


def is_foreign(code: CodeType | None) -> bool:
    """Whether code comes from neither ComfyUI's library, FastUSP, torch nor Python."""
    if code is None:
        return False
    file = code.co_filename
    return not file.startswith((COMFY, OWN, TORCH, "<frozen ")) and not is_python(file)


def is_python(file: str) -> bool:
    """Whether a file is of Python's standard library."""
    return file.startswith(_STDLIB) and not any(folder in file for folder in _INSTALLED)


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


def owner(value: object) -> str:
    """Whose a function, its code, a class or an instance is, for people: a node pack, else a module or file."""
    if isinstance(value, functools.partial):
        return "functools.partial"  # whoever made it is not to be seen
    code = value if isinstance(value, CodeType) else code_of(value)
    if code is not None:
        file = code.co_filename
        module = next((n for n, m in list(sys.modules.items()) if getattr(m, "__file__", None) == file), file)
    else:
        kind = value if isinstance(value, type) else type(value)
        module = kind.__module__
        file = getattr(sys.modules.get(module), "__file__", None) or ""
    pack = pack_of(file)
    return pack or module


def module_of(code: CodeType, scope: dict) -> ModuleType | None:
    """The module of ComfyUI's library in whose globals, `scope`, a function runs."""
    module = sys.modules.get(scope.get("__name__", ""))
    return module if code.co_filename.startswith(COMFY) and getattr(module, "__dict__", None) is scope else None


def used_functions(module: ModuleType, name: str) -> set[str]:
    """The functions of a module that one of its functions refers to, and those that these refer to, by the file."""
    by_name = {name: code for code, name in codes(module).items()}
    found, open_names = set(), [name]
    while open_names:
        name = open_names.pop()
        if name in by_name and name not in found:
            found.add(name)
            open_names += names_in(by_name[name])
    return found


def names_in(code: CodeType) -> set[str]:
    """The global and attribute names that code refers to, nested functions included."""
    nested = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)


def strings_in(code: CodeType) -> set[str]:
    """The text constants of code itself, those in constant tuples and sets included."""

    def walk(constants: Iterable) -> Iterator[str]:
        for constant in constants:
            if isinstance(constant, str):
                yield constant
            elif isinstance(constant, tuple | frozenset):
                yield from walk(constant)

    return set(walk(code.co_consts))


@functools.cache
def reader(text: str, modules: frozenset[ModuleType]) -> str | None:
    """A function of these modules whose code holds a text, such as a key that it looks up; None if there is none."""
    for module in modules:
        for code, name in codes(module).items():
            if text in strings_in(code):
                return f"{module.__name__}.{name}"
    return None


def packs() -> set[str]:
    """The other node packs of which modules are loaded."""
    return {pack for module in list(sys.modules.values()) if (pack := pack_of(getattr(module, "__file__", None) or ""))}


@functools.cache
def packs_naming(text: str) -> list[str]:
    """The other node packs in whose code a text stands."""
    found = set()
    for module in list(sys.modules.values()):
        pack = pack_of(getattr(module, "__file__", None) or "")
        if pack is not None and any(text in strings_in(code) for code in codes(module)):
            found.add(pack)
    return sorted(found)


def family_modules(kind: type) -> list[ModuleType]:
    """The modules of ComfyUI's models (comfy.ldm) that a transformer's class is made from."""
    found, open_names = {}, [kind.__module__]
    while open_names:
        name = open_names.pop()
        module = sys.modules.get(name)
        if module is None or name in found or not name.startswith("comfy.ldm."):
            continue
        found[name] = module
        for value in vars(module).values():
            if isinstance(value, ModuleType):
                open_names.append(value.__name__)
            elif isinstance(value, type | FunctionType):
                open_names.append(value.__module__ or "")
    return list(found.values())


def replaced_in(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The qualified names of a module's functions, classes and methods that a pack replaced, and what stands there."""
    for name, value in vars(module).items():
        if isinstance(value, type):
            if pack_of(_file_of(value)) is not None:
                yield f"{module.__name__}.{name}", value
            elif value.__module__ == module.__name__:
                for part, inner in vars(value).items():
                    if _is_replaced(module, f"{name}.{part}", inner):
                        yield f"{module.__name__}.{name}.{part}", inner
        elif _is_replaced(module, name, value):
            yield f"{module.__name__}.{name}", value


def _is_replaced(module: ModuleType, name: str, value: object) -> bool:
    """A pack's function counts wherever it stands; one from elsewhere where the file defines a function: decorators
    such as `dataclass` write functions, and modules take some from libraries."""
    code = code_of(value)
    if code is not None and pack_of(code.co_filename) is not None:
        return True
    if name not in codes(module).values():
        return False
    if code is None:
        return isinstance(value, functools.partial | functools.partialmethod)
    return code not in codes(module) and is_foreign(code) and not is_installed(code.co_filename)


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
