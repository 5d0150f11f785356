"""What runs inside a rehearsal (rehearsal.py), seen through Python's profile function; and whose it is."""

import inspect
import sys
from types import CodeType, FrameType, MethodType, ModuleType

import torch

from . import provenance
from .comfyui import WrapperExecutor

_ASIDE = {"__del__", "get_free_memory"}
"""Below functions of these names nothing is looked at: finalisers run at any time and swallow what is raised in them,
and how much memory is free decides no result."""


class Obstacle(BaseException):
    """Ends a rehearsal; its text says what keeps the loop out of the workers. No Exception: ComfyUI and packs catch
    those on the way."""


class CallTracer:
    """Sees the functions that are called inside a `with`, by the function of code `outermost`. found: the first
    obstacle."""

    def __init__(self, outermost: CodeType):
        self.found: str | None = None
        self._outermost = outermost
        self.codes: dict[CodeType, ModuleType] = {}
        """ComfyUI's own that were called."""
        self._seen: set[CodeType] = set()
        self._instances: dict[int, object] = {}

    def fail(self, text: str) -> None:
        """Notes an obstacle and raises it."""
        self.found = self.found or text
        raise Obstacle(text)

    def __enter__(self):
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_error):
        sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, _argument) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(provenance.COMFY) and code.co_argcount and code.co_varnames[0] == "self":
            instance = frame.f_locals["self"]
            self._instances[id(instance)] = instance
        if code in self._seen or code.co_filename.startswith((provenance.OWN, provenance.TORCH)):
            return
        module = provenance.module_of(code, frame.f_globals)
        if module is None:
            if not self._is_library(frame) and not self._is_aside(frame):
                self.fail(_described(frame))
            return
        self._seen.add(code)
        if code in provenance.codes(module):
            self.codes[code] = module
        else:
            name = provenance.short_name(module.__name__)
            self.fail(f"{name}.{code.co_name} is older than its file: restart ComfyUI")

    def _is_library(self, frame: FrameType) -> bool:
        """Whether a function is Python's, or of a library that the file of its caller imports, or called by either or
        by FastUSP's transformer."""
        file, caller = frame.f_code.co_filename, frame.f_back
        if provenance.pack_of(file) is not None:
            return False
        looked_at = (provenance.COMFY, provenance.TORCH)
        if not caller.f_code.co_filename.startswith(looked_at) and caller.f_code is not self._outermost:
            return True
        name = frame.f_globals.get("__name__", "")
        if provenance.is_python(file) or name.startswith("namedtuple_"):
            return True
        return provenance.is_installed(file) and isinstance(caller.f_globals.get(name.split(".")[0]), ModuleType)

    def _is_aside(self, frame: FrameType | None) -> bool:
        """Whether a function was called by one of _ASIDE, through whichever others, or is one."""
        while frame is not None and frame.f_code is not self._outermost:
            if frame.f_code.co_name in _ASIDE:
                return True
            frame = frame.f_back
        return False

    def check_names(self) -> None:
        """Looks at the names that the called functions use, in ComfyUI's modules and in the classes and instances that
        took part. A value there that is no Python function is an obstacle unless it is ComfyUI's own: the profile
        function does not see it being called."""
        used = frozenset().union(*map(provenance.names_in, self.codes))
        for module in {*self.codes.values()}:
            for name in used & provenance.names(module) & vars(module).keys():
                value = vars(module)[name]
                if provenance.code_of(value) is None:
                    self.fail(provenance.change_of(module, name, value))
        for instance in self._instances.values():
            change = changed_in(instance, used, every=False)
            if change is not None:
                self.fail(change)


def changed_in(instance: object, used: frozenset[str], *, every: bool) -> str | None:
    """A method of an instance, or of its classes in ComfyUI's library, among the names `used`, at which something else
    stands: anything, or only what is no Python function."""
    for kind in type(instance).__mro__:
        module = sys.modules.get(kind.__module__)
        if module is None or not kind.__module__.startswith("comfy."):
            continue
        for name in used & vars(kind).keys():
            value, whole = vars(kind)[name], f"{kind.__qualname__}.{name}"
            if whole in provenance.names(module) and (every or provenance.code_of(value) is None):
                if not _is_own(value) and not provenance.is_original(module, whole):
                    return provenance.change_of(module, whole, value)
    for name in used & getattr(instance, "__dict__", {}).keys():
        value = vars(instance)[name]
        if (every or provenance.code_of(value) is None) and _hides_a_method(instance, name) and not _is_own(value):
            return f"{provenance.owner(value)} changed {_shown(instance)}.{name}"
    return None


def _hides_a_method(instance: object, name: str) -> bool:
    """Whether an instance's own value stands before its class's method, and is not that method, as ComfyUI leaves it
    when an object patch is undone."""
    value, held = vars(instance)[name], inspect.getattr_static(type(instance), name, None)
    is_it = isinstance(value, MethodType) and value.__self__ is instance and value.__func__ is held
    return provenance.code_of(held) is not None and not is_it


def _is_own(value: object) -> bool:
    code = provenance.code_of(value)
    return code is not None and code.co_filename.startswith(provenance.OWN)


def _described(frame: FrameType) -> str:
    """A foreign function that is about to run: where it stands, and whose it is."""
    code, caller = frame.f_code, frame.f_back
    by = provenance.owner(code)
    scope = caller.f_locals
    this = scope.get("self")
    if isinstance(this, WrapperExecutor) and not _runs(this.original, code):
        return f"{by} wraps {this.original.__name__}"
    parts = this.children() if isinstance(this, torch.nn.Module) else (getattr(this, "class_obj", None),)
    for value in (*parts, this, *scope.values()):
        for holder in (value, *type(value).__mro__):
            for name, held in list(getattr(holder, "__dict__", {}).items()):
                if _runs(held, code):
                    own = provenance.file_of(sys.modules.get(type(value).__module__)) == code.co_filename
                    return f"{_shown(value)} of {by}" if own else f"{by} changed {_shown(value)}.{name}"
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("comfy."):
            for name, held in list(vars(module).items()):
                if _runs(held, code):
                    return f"{by} changed {provenance.short_name(module_name)}.{name}"
    if caller.f_code.co_filename.startswith(provenance.TORCH) and isinstance(this, torch.nn.Module):
        return f"{by} hooks into the {_shown(this)}"
    return f"{by}'s {code.co_name}, called by {caller.f_code.co_name}"


def _shown(instance: object) -> str:
    return getattr(type(instance), "shown_as", type(instance).__name__)


def _runs(value: object, code: CodeType) -> bool:
    """Whether calling a value runs `code`."""
    called = vars(type(value)).get("__call__") if code.co_name == "__call__" else value
    return provenance.code_of(called) is code
