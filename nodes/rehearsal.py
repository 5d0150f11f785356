"""A rehearsal of one evaluation: whether all that happens between a sampler and the transformer is ComfyUI's own.

A sampling loop in the workers leaves out what ComfyUI does around the transformer at each step. That is right only as
long as nobody has changed it, and there are many places for a change: options, wrappers, hooks, methods of instances,
functions of modules, classes. Instead of looking at lists of such places, one evaluation runs through ComfyUI with a
transformer that answers zeros (some milliseconds), and is watched:

- each Python function that is called must be ComfyUI's, as its file has it, or of torch, Python or a library that the
  calling file imports (a profile function sees every call);
- what else stands at the names that these functions use must be no callable that a profile function cannot see;
- options and conditioning that the loop does not know may lie there, as long as nothing reads them.

A foreign function is found before it runs. What the sampler's own function reaches runs in the workers instead, so that
nothing calls it here: it is looked at by name alone (obstacles.py).
"""

import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Callable, Iterator

import torch

from . import provenance
from .call_tracer import CallTracer, Obstacle
from .reachable import Unchanged

log = logging.getLogger(__name__)

_KNOWN_OPTIONS = {"transformer_options", "disable_cfg1_optimization"}
_KNOWN_TRANSFORMER_OPTIONS = {"wrappers", "callbacks", "sample_sigmas", "patches", "patches_replace"}
"""Functions in the first two are seen when they are called; the transformer looks at patches for itself."""
_KNOWN_CONDITIONING = {"model_conds", "uuid"}


def rehearse(
    model, guider, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict, conditionings: list[str]
) -> str | None:
    """What a sampler function's evaluations, model(x, sigma, **extra_args), meet that the workers' loop would leave
    out; None if nothing. conditionings: the names of those of the guider that are evaluated."""
    if sys.getprofile() is not None:
        return "a profiler is active"
    transformer = guider.inner_model.diffusion_model
    tracer = CallTracer(rehearse.__code__)
    options = _Observed(extra_args["model_options"], _KNOWN_OPTIONS, "on the model", tracer.fail)
    try:
        with _observed_conditionings(guider, conditionings, tracer.fail), transformer.rehearsing() as arrived, tracer:
            model(x, sigmas[0] * x.new_ones(len(x)), **extra_args | {"model_options": options})
        tracer.check_names()
        _check_transformer_options(options.get("transformer_options", {}), arrived, tracer, transformer.stock)
        if transformer.left_out(arrived):
            tracer.fail("blocks are left out")
    except Obstacle:
        pass  # told by what the tracer has found, as are those that somebody swallowed
    except Exception:
        if tracer.found is None:
            raise  # as it would be while stepping; else somebody made another error of an obstacle
    return tracer.found


class _Observed(dict):
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
        return [super(_Observed, self).__getitem__(key) for key in self]

    def items(self):
        return [(key, super(_Observed, self).__getitem__(key)) for key in self]

    def copy(self):
        return dict(self.items())


def _says_nothing(key, value) -> bool:
    """Whether ComfyUI does the same without this entry."""
    return value is None or isinstance(value, dict | list | tuple) and not value or key == "strength" and value == 1.0


@contextlib.contextmanager
def _observed_conditionings(guider, names: list[str], fail: Callable[[str], None]) -> Iterator[None]:
    given = guider.conds
    observed = {}
    for name in names:
        where = f"on the {name} conditioning"
        observed[name] = [_Observed(_short(part), _KNOWN_CONDITIONING, where, fail) for part in given[name]]
    guider.conds = given | observed
    try:
        yield
    finally:
        guider.conds = given


def _short(conditioning: dict) -> dict:
    """The same with a text of one token: the whole one, 8 MB for FLUX.1, would be copied and sent to the GPU for a
    transformer that does not look at it. Left alone where a mask counts its tokens."""
    conds = conditioning.get("model_conds", {})
    text = conds.get("c_crossattn")
    if "attention_mask" in conds or not isinstance(getattr(text, "cond", None), torch.Tensor):
        return conditioning
    one = copy.copy(text)  # with whatever lies on the instance
    one.cond = text.cond[:, :1]
    return conditioning | {"model_conds": conds | {"c_crossattn": one}}


def _check_transformer_options(given: dict, arrived: dict, tracer: CallTracer, stock: Unchanged) -> None:
    """Finds an option that reached the transformer as it was given and that a function reads on the way, or in the
    transformer that ComfyUI would have: code holds the key."""
    for key, value in given.items():
        if key in _KNOWN_TRANSFORMER_OPTIONS or _says_nothing(key, value):
            continue
        if not isinstance(value, dict | list) and arrived.get(key) is not value:
            continue  # ComfyUI has put its own there; dicts and lists it copies
        on_the_way = (code.co_name for code in tracer.codes if key in provenance.strings_in(code))
        reader = next(on_the_way, None) or stock.reader(key)
        if reader is not None:
            tracer.fail(f"{key}{_by(key, value)} on the model, read by {reader}")
        _note(str(key), _by(key, value))


@functools.cache
def _note(key: str, by: str) -> None:
    """Logs it once a process."""
    log.info("FastUSP: %s%s on the model: nothing reads it, so it changes nothing", key, by)


def _by(key, value: object) -> str:
    """Says whose an entry is: of whom there is a function or an object in it; else which node packs name its key."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    owners = {provenance.owner(part) for part in parts}
    owners = {by for by in owners if by.partition(".")[0] not in ("builtins", "torch", "numpy")}
    named = sorted(owners) or provenance.packs_naming(str(key))
    return f" ({', '.join(named)})" if named else ""
