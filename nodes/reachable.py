"""What a function or class of ComfyUI's library reaches: the functions and classes that its code names, those that
these name, and so on. Told from the files' code, whatever stands in the modules now; more may be listed than is called.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

from . import provenance


class Place(NamedTuple):
    """A global name of a module, at which a function or class of the library was, or is, to be found."""

    module: ModuleType
    name: str


@functools.cache
def reached(module: ModuleType, name: str, library: str) -> tuple[Place, ...]:
    """The places of what a function or class reaches, itself included, in modules whose names begin with `library`."""
    found: dict[Place, None] = {}
    open_places = [Place(module, name)]
    while open_places:
        place = open_places.pop()
        if place not in found:
            found[place] = None
            open_places += _decorators(place)
            open_places += _bases(place, library)
            for code in codes_at(place):
                open_places += _named(place.module, provenance.names_in(code), library)
    return tuple(found)


@functools.cache
def codes_at(place: Place) -> tuple[CodeType, ...]:
    """The code that a place's file has there: a function's, or of all methods of a class; none for an imported name."""
    inside = f"{place.name}."
    codes = provenance.codes(place.module).items()
    return tuple(code for code, name in codes if name == place.name or name.startswith(inside))


def _decorators(place: Place) -> Iterator[Place]:
    """The functions of the same module that wrapped the one at a place: nothing in its own code names them."""
    value = vars(place.module).get(place.name)
    while isinstance(value, FunctionType):
        name = provenance.codes(place.module).get(value.__code__)
        if name is not None:
            yield Place(place.module, name.partition(".")[0])
        value = getattr(value, "__wrapped__", None)


def _bases(place: Place, library: str) -> Iterator[Place]:
    """The library's classes that the one at a place inherits from: its own code need not name them."""
    value = vars(place.module).get(place.name)
    for base in value.__bases__ if isinstance(value, type) else ():
        if base.__module__.startswith(library):
            yield Place(sys.modules[base.__module__], base.__name__)


def _named(module: ModuleType, used: frozenset[str], library: str) -> Iterator[Place]:
    """The places in the library that names mean in a module: its own and imported functions and classes, and those of
    modules that it refers to, at whatever depth (comfy.ldm.common_dit.pad)."""
    modules, seen = [module], set()
    while modules:
        scope = modules.pop()
        seen.add(scope)
        for name in used & vars(scope).keys():
            value = vars(scope)[name]
            if isinstance(value, ModuleType):
                inside = value.__name__.startswith(library) or library.startswith(f"{value.__name__}.")
                if inside and value not in seen:
                    modules.append(value)
            elif isinstance(value, FunctionType | type) or name in _defined(scope):
                yield Place(scope, name)
                home = sys.modules.get(getattr(value, "__module__", None) or "")
                if home not in (None, scope) and home.__name__.startswith(library):
                    yield Place(home, value.__name__)


@functools.cache
def _defined(module: ModuleType) -> frozenset[str]:
    """The functions and classes that a module's file defines."""
    return frozenset(name.partition(".")[0] for name in provenance.names(module))


def changed(place: Place) -> tuple[str, object] | None:
    """The qualified name and the value of a pack's function, or class, at a place or in the class there; None where
    there is none."""
    value = vars(place.module).get(place.name)
    if not isinstance(value, type):
        return (place.name, value) if _is_changed(place.module, place.name, value) else None
    if provenance.pack_of(provenance.file_of(sys.modules.get(value.__module__))) is not None:
        return place.name, value
    if value.__module__ == place.module.__name__:
        for part, inner in vars(value).items():
            if _is_changed(place.module, f"{place.name}.{part}", inner):
                return f"{place.name}.{part}", inner
    return None


def _is_changed(module: ModuleType, name: str, value: object) -> bool:
    """A pack's function counts wherever it stands; one from elsewhere where the file defines a function: decorators
    such as `dataclass` write functions, and modules take some from libraries."""
    code = provenance.code_of(value)
    if code is None:  # no Python function: a pack's callable object, or what hides a function
        made_by = provenance.file_of(sys.modules.get(type(value).__module__))
        return isinstance(value, functools.partial | functools.partialmethod) or provenance.pack_of(made_by) is not None
    if provenance.pack_of(code.co_filename) is not None:
        return True
    if name not in provenance.names(module):
        return False
    known = code in provenance.codes(module) or provenance.is_installed(code.co_filename)
    return not known and provenance.is_foreign(code)


class Unchanged:
    """Whether what a class reaches is still its files'. What was found so is remembered by what stood there, so that
    asking again costs a look."""

    def __init__(self, kind: type):
        self.places = reached(sys.modules[kind.__module__], kind.__name__, "comfy.ldm.")
        self._known: dict[Place, list[tuple[dict, str, object]]] = {}
        self._readers: dict[str, str | None] = {}

    def changes(self) -> Iterator[tuple[Place, str, object]]:
        """Place, qualified name and value of what is not."""
        for place in self.places:
            known = self._known.get(place)
            if known is not None and _still_there(known):
                continue
            change = changed(place)
            if change is None:
                self._known[place] = list(_values_at(place))
            else:
                yield place, *change

    def reader(self, text: str) -> str | None:
        """A function whose code holds a text, such as a key that it looks up; None if there is none."""
        if text not in self._readers:
            reading = (p for p in self.places for code in codes_at(p) if text in provenance.strings_in(code))
            place = next(reading, None)
            self._readers[text] = place and f"{provenance.short_name(place.module.__name__)}.{place.name}"
        return self._readers[text]


@functools.cache
def unchanged(kind: type) -> Unchanged:
    """The one `Unchanged` of a class."""
    return Unchanged(kind)


def _still_there(known: list[tuple[dict, str, object]]) -> bool:
    """Whether each scope has each value at its name. A plain loop: this runs before each evaluation, and a rehearsal's
    tracer sees every step of a generator."""
    for scope, name, value in known:
        if scope.get(name) is not value:
            return False
    return True


def _values_at(place: Place) -> Iterator[tuple[dict, str, object]]:
    value = vars(place.module).get(place.name)
    yield vars(place.module), place.name, value
    if isinstance(value, type):
        for name, inner in vars(value).items():
            if inspect.isroutine(inner) or isinstance(inner, property):
                yield vars(value), name, inner
