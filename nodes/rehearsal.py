"""A rehearsal of one evaluation: whether all that happens between a sampler and the transformer is ComfyUI's own.

A sampling loop in the workers leaves out what ComfyUI does around the transformer at each step. That is right only as
long as nobody has changed it, and there are many places for a change: options, wrappers, hooks, methods of instances,
functions of modules, classes. Instead of looking at lists of such places, one evaluation runs through ComfyUI with a
transformer that answers zeros (two milliseconds), and is watched:

- each Python function that is called must be ComfyUI's, as its file has it, or of torch, Python or a library that the
  calling file imports (a profile function sees every call);
- what else stands at the names that these functions use must be no callable that a profile function cannot see;
- options and conditioning that the loop does not know may lie there, as long as nothing reads them.

A foreign function is found before it runs. What the sampler's own function reaches runs in the workers instead, so that
nothing calls it here: it is looked at by name alone (`changed_sampler`).
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import CodeType

import torch

from . import closure, originals
from .comfyui import k_diffusion, samplers
from .watch import Obstacle, Watch, changed_in

log = logging.getLogger(__name__)

_KNOWN_OPTIONS = {"transformer_options", "disable_cfg1_optimization"}
_KNOWN_TRANSFORMER_OPTIONS = {"wrappers", "callbacks", "sample_sigmas", "patches", "patches_replace"}
"""Those whose functions are seen when they are called; patches the transformer looks at for itself."""
_KNOWN_CONDITIONING = {"model_conds", "uuid"}


def rehearse(
    model, guider, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict, conditionings: list[str]
) -> str | None:
    """What a sampler function's evaluations, model(x, sigma, **extra_args), meet that the workers' loop would leave
    out; None if nothing. conditionings: the names of those of the guider that are evaluated."""
    if type(model) is not samplers.KSamplerX0Inpaint or model.inner_model is not guider:
        return f"{originals.owner(model)} wraps the model in {type(model).__name__}"
    if sys.getprofile() is not None:
        return "a profiler is active"
    transformer = guider.inner_model.diffusion_model
    watch = Watch(rehearse.__code__)
    options = _Watched(extra_args["model_options"], _KNOWN_OPTIONS, "on the model", watch.fail)
    try:
        with _watched_conditionings(guider, conditionings, watch.fail), transformer.rehearsing() as arrived, watch:
            model(x, sigmas[0] * x.new_ones(len(x)), **extra_args | {"model_options": options})
        watch.check_names()
        _check_transformer_options(options.get("transformer_options", {}), arrived, watch, transformer.stock)
    except Obstacle:
        pass  # told by what the watch has found, as are those that somebody swallowed
    except Exception:
        if watch.found is None:
            raise  # as it would be while stepping; else somebody made another error of an obstacle
    return watch.found


def changed_sampler(name: str, model) -> str | None:
    """What somebody has changed of ComfyUI's sampler function `name`, or of what it uses of a model (BaseModel); None
    if nothing."""
    used: set[CodeType] = set()
    for place in closure.reached(k_diffusion, f"sample_{name}", "comfy."):
        change = _changed_at(place)
        if change is not None:
            return change
        used |= {*closure.codes_at(place)}
    names = frozenset().union(*map(originals.names_in, used))
    for instance in (model, model.model_sampling):
        change = changed_in(instance, names, every=True)
        if change is not None:
            return change
    return None


def _changed_at(place: closure.Place) -> str | None:
    value = vars(place.module).get(place.name)
    if place.name in originals.names(place.module):
        if originals.is_original(place.module, place.name):
            return None
        return originals.change_of(place.module, place.name, value)
    change = closure.changed(place)
    return None if change is None else originals.change_of(place.module, *change)


class _Watched(dict):
    """A dict of which reading a key is an obstacle, but for `known` keys and for what says nothing. Iterating over it
    counts as reading all of it."""

    def __init__(self, values: dict, known: set[str], where: str, fail: Callable[[str], None]):
        super().__init__(values)
        self._known, self._where, self._fail = known, where, fail

    def _look(self, key) -> None:
        if key not in self._known and super().__contains__(key) and not _says_nothing(key, super().__getitem__(key)):
            self._fail(f"{key}{_by(key, super().__getitem__(key))} {self._where}")

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
def _watched_conditionings(guider, names: list[str], fail: Callable[[str], None]) -> Iterator[None]:
    given = guider.conds
    watched = {
        name: [_Watched(part, _KNOWN_CONDITIONING, f"on the {name} conditioning", fail) for part in given[name]]
        for name in names
    }
    guider.conds = given | watched
    try:
        yield
    finally:
        guider.conds = given


def _check_transformer_options(given: dict, arrived: dict, watch: Watch, stock: closure.Unchanged) -> None:
    """Finds an option that reached the transformer as it was given and that a function reads on the way, or in the
    transformer that ComfyUI would have: code holds the key."""
    for key, value in given.items():
        if key in _KNOWN_TRANSFORMER_OPTIONS or _says_nothing(key, value):
            continue
        if not isinstance(value, dict | list) and arrived.get(key) is not value:
            continue  # ComfyUI has put its own there; dicts and lists it copies
        on_the_way = (code.co_name for code in watch.codes if key in originals.strings_in(code))
        reader = next(on_the_way, None) or stock.reader(key)
        if reader is not None:
            watch.fail(f"{key}{_by(key, value)} on the model, read by {reader}")
        _note(str(key), _by(key, value))


@functools.cache
def _note(key: str, by: str) -> None:
    """Once a process."""
    log.info("FastUSP: %s%s on the model: nothing reads it, so it changes nothing", key, by)


def _by(key, value: object) -> str:
    """Whose an entry is: of whom there is a function or an object in it; else which node packs name its key."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    owners = {originals.owner(part) for part in parts}
    owners = {by for by in owners if by.partition(".")[0] not in ("builtins", "torch", "numpy")}
    named = sorted(owners) or originals.packs_naming(str(key))
    return f" ({', '.join(named)})" if named else ""
