"""A rehearsal of one evaluation: whether all that happens between a sampler and the transformer is ComfyUI's own.

A sampling loop in the workers leaves out what ComfyUI does around the transformer at each step. That is right only as
long as nobody has changed it, and there are many places for a change: options, wrappers, hooks, methods of instances,
functions of modules, classes. Instead of looking at lists of such places, one evaluation runs through ComfyUI with a
transformer that answers zeros (two milliseconds), and is watched:

- each Python function that is called must be ComfyUI's, as its file has it, or of torch, Python or a library that the
  calling file imports (a profile function sees every call);
- what stands at the names that these functions use, in their modules, classes and instances, must be so as well: not
  everything that can be called is a Python function;
- options and conditioning that the loop does not know may lie there, as long as nothing reads them.

A foreign function is found before it runs: it is not called once more than it would be.
"""

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, MethodType, ModuleType

import torch

from . import originals
from .comfyui import WrapperExecutor, samplers

log = logging.getLogger(__name__)

_KNOWN_OPTIONS = {"transformer_options", "disable_cfg1_optimization"}
_KNOWN_TRANSFORMER_OPTIONS = {"wrappers", "callbacks", "sample_sigmas"}
_KNOWN_CONDITIONING = {"model_conds", "uuid"}


class Obstacle(BaseException):
    """Ends a rehearsal; its text says what keeps the loop out of the workers. No Exception: ComfyUI and packs catch
    those on the way."""


def rehearse(model, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict, conditionings: list[str]) -> str | None:
    """What a sampler function's evaluations, model(x, sigma, **extra_args), meet that the workers' loop would leave
    out; None if nothing. conditionings: the names of those that are evaluated."""
    if type(model) is not samplers.KSamplerX0Inpaint or not isinstance(model.inner_model, samplers.CFGGuider):
        return f"{originals.owner(model)}'s {type(model).__name__} around the model"
    guider = model.inner_model
    transformer = guider.inner_model.diffusion_model
    options = _Watched(extra_args["model_options"], _KNOWN_OPTIONS, "on the model")
    watch = _Watch()
    try:
        with _watched_conditionings(guider, conditionings), transformer.rehearsing() as arrived, watch:
            model(x, sigmas[0] * x.new_ones(len(x)), **extra_args | {"model_options": options})
        watch.check_names()
        _check_transformer_options(options.get("transformer_options", {}), arrived, watch, transformer.stock)
    except Obstacle as obstacle:
        return str(obstacle)
    return None


class _Watched(dict):
    """A dict of which reading a key is an obstacle, but for `known` keys and for what says nothing. Iterating over it
    counts as reading all of it."""

    def __init__(self, values: dict, known: set[str], where: str):
        super().__init__(values)
        self._known, self._where = known, where

    def _look(self, key) -> None:
        if key not in self._known and super().__contains__(key) and not _says_nothing(key, super().__getitem__(key)):
            raise Obstacle(f"{key}{_by(key, super().__getitem__(key))} {self._where}")

    def __getitem__(self, key):
        self._look(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self._look(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self._look(key)
        return super().get(key, default)

    def pop(self, key, *default):
        self._look(key)
        return super().pop(key, *default)

    def setdefault(self, key, default=None):
        self._look(key)
        return super().setdefault(key, default)

    def __iter__(self):
        for key in super().__iter__():
            self._look(key)
            yield key

    def keys(self):
        return list(self)

    def values(self):
        return [super(_Watched, self).__getitem__(key) for key in self]

    def items(self):
        return [(key, super(_Watched, self).__getitem__(key)) for key in self]

    def copy(self):
        return dict(self.items())


def _says_nothing(key, value) -> bool:
    """Whether ComfyUI does the same without this entry."""
    return value is None or isinstance(value, dict | list | tuple) and not value or key == "strength" and value == 1.0


@contextlib.contextmanager
def _watched_conditionings(guider, names: list[str]) -> Iterator[None]:
    given = guider.conds
    watched = {
        name: [_Watched(part, _KNOWN_CONDITIONING, f"on the {name} conditioning") for part in given[name]]
        for name in names
    }
    guider.conds = given | watched
    try:
        yield
    finally:
        guider.conds = given


class _Watch:
    """Sees the functions that are called inside a `with`; raises Obstacle there, or in `check_names` after it."""

    def __init__(self):
        self.codes: dict[CodeType, ModuleType] = {}
        """ComfyUI's own that were called."""
        self._seen: set[CodeType] = set()
        self._instances: dict[int, object] = {}

    def __enter__(self):
        self._previous = sys.getprofile()
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_error):
        sys.setprofile(self._previous)

    def _called(self, frame: FrameType, event: str, _argument) -> None:
        code = frame.f_code
        if event != "call":
            return
        if code.co_filename.startswith(originals.COMFY) and code.co_argcount and code.co_varnames[0] == "self":
            instance = frame.f_locals["self"]
            self._instances[id(instance)] = instance
        if code in self._seen:
            return
        self._seen.add(code)
        if code.co_filename.startswith((originals.OWN, originals.TORCH)):
            return
        module = originals.module_of(code, frame.f_globals)
        if module is not None:
            if code not in originals.codes(module):
                raise Obstacle(f"{module.__name__}.{code.co_name} is not what its file has: was ComfyUI updated?")
            self.codes[code] = module
        elif not _is_library(frame):
            raise Obstacle(_described(frame))

    def check_names(self) -> None:
        """What the functions that were called refer to by name, in ComfyUI's modules, classes and instances."""
        used = set().union(*map(originals.names_in, self.codes))
        for module in {*self.codes.values()}:
            for name in used & originals.names(module) & vars(module).keys():
                _check(module, name, vars(module)[name])
        for instance in self._instances.values():
            for kind in type(instance).__mro__:
                module = sys.modules.get(kind.__module__)
                if module is None or not kind.__module__.startswith("comfy."):
                    continue
                for name in used & vars(kind).keys():
                    _check(module, f"{kind.__qualname__}.{name}", vars(kind)[name])
            for name in used & getattr(instance, "__dict__", {}).keys():
                if _hides_a_method(instance, name) and not _is_own(vars(instance)[name]):
                    raise Obstacle(f"{originals.owner(vars(instance)[name])}'s {type(instance).__name__}.{name}")


def _check(module: ModuleType, name: str, value: object) -> None:
    """Raises Obstacle where a module's file defines a function of this name and another one stands there."""
    if name in originals.names(module) and not _is_own(value) and not originals.is_original(module, name):
        raise Obstacle(f"{originals.owner(value)}'s {short_name(module.__name__)}.{name}")


def short_name(module: str) -> str:
    """ComfyUI's library goes without saying: a status line is short."""
    return module.removeprefix("comfy.")


def _hides_a_method(instance: object, name: str) -> bool:
    """Whether an instance's own value stands before its class's method, and is not that method, as ComfyUI leaves it
    when an object patch is undone."""
    value, held = vars(instance)[name], inspect.getattr_static(type(instance), name, None)
    is_it = isinstance(value, MethodType) and value.__self__ is instance and value.__func__ is held
    return originals.code_of(held) is not None and not is_it


def _is_own(value: object) -> bool:
    code = originals.code_of(value)
    return code is not None and code.co_filename.startswith(originals.OWN)


def _is_library(frame: FrameType) -> bool:
    """Whether a function is Python's, or of a library that the file of its caller imports, or called by either or by
    FastUSP."""
    file, caller = frame.f_code.co_filename, frame.f_back
    if originals.pack_of(file) is not None:
        return False
    if not caller.f_code.co_filename.startswith((originals.COMFY, originals.TORCH)):
        return True
    name = frame.f_globals.get("__name__", "")
    if originals.is_python(file) or file.startswith("<frozen ") or name.startswith("namedtuple_"):
        return True
    return originals.is_installed(file) and isinstance(caller.f_globals.get(name.split(".")[0]), ModuleType)


def _described(frame: FrameType) -> str:
    """A foreign function that is about to run: where it stands, and whose it is."""
    code, caller = frame.f_code, frame.f_back
    by = originals.owner(code)
    scope = caller.f_locals
    this = scope.get("self")
    if isinstance(this, WrapperExecutor) and not _runs(this.original, code):
        return f"{by}'s wrapper around {this.original.__name__}"
    parts = this.children() if isinstance(this, torch.nn.Module) else (getattr(this, "class_obj", None),)
    for value in (*parts, this, *scope.values()):
        for holder in (value, *type(value).__mro__):
            for name, held in getattr(holder, "__dict__", {}).items():
                if _runs(held, code):
                    return f"{by}'s {type(value).__name__}.{name}"
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("comfy."):
            for name, held in list(vars(module).items()):
                if _runs(held, code):
                    return f"{by}'s {short_name(module_name)}.{name}"
    if caller.f_code.co_filename.startswith(originals.TORCH):
        return f"{by}'s hook on {type(this).__name__}"
    return f"{by}'s {code.co_name}, called by {caller.f_code.co_name}"


def _runs(value: object, code: CodeType) -> bool:
    """Whether calling a value runs `code`."""
    called = vars(type(value)).get("__call__") if code.co_name == "__call__" else value
    return originals.code_of(called) is code


def _check_transformer_options(given: dict, arrived: dict, watch: _Watch, stock: type) -> None:
    """Raises Obstacle for an option that reached the transformer as it was given and that a function reads on the way,
    or in the transformer that ComfyUI would have: its files hold the key."""
    modules = {*watch.codes.values(), *originals.family_modules(stock)}
    for key, value in given.items():
        if key in _KNOWN_TRANSFORMER_OPTIONS or _says_nothing(key, value):
            continue
        if not isinstance(value, dict | list) and arrived.get(key) is not value:
            continue  # ComfyUI has put its own there; dicts and lists it copies
        reader = originals.reader(key, frozenset(modules))
        if reader is not None:
            raise Obstacle(f"{key}{_by(key, value)} on the model, read by {reader}")
        _note(str(key), _by(key, value))


@functools.cache
def _note(key: str, by: str) -> None:
    """Once a process."""
    log.info("FastUSP: %s%s on the model: nothing reads it, so it changes nothing", key, by)


def _by(key, value: object) -> str:
    """Which node pack left an entry: that of a function or class in it, else those that name its key."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    owners = {originals.owner(part) for part in parts} - {"builtins"}
    packs = sorted(owners & originals.packs()) or originals.packs_naming(str(key))
    return f" ({', '.join(packs)})" if packs else ""
