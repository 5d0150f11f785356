"""From a file to the tensors that its transformer needs. All others in it are left alone, whatever they are."""

import itertools
import logging
import math
import os
from collections import Counter
from dataclasses import dataclass, replace

import torch

from ..config import FileState, ModelSpec
from ..errors import CheckpointError
from ..weights.contents import read_contents
from ..weights.scales import fold_scales, refuse_foreign, used_for_scales
from ..weights.sizes import Sizes
from ..weights.source import Source, changed
from ..weights.storage_plan import StoragePlan, Use, plan_storage
from ..weights.tensor_info import TensorInfo
from .detection import FAMILIES, Incomplete, detect, family_of, first_of, needed_tensors
from .diffusers_layout import MARKS, with_original_names
from .family import FamilyConfig, Transformer
from .layers import Linear

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file's model.

    source: the file, open.
    config: the model's sizes.
    model: the transformer without weights, on the meta device.
    header: the tensors that it needs, under the transformer's own names in files.
    ignored: the names of the transformer's tensors that nothing needs.
    """

    source: Source
    config: FamilyConfig
    model: Transformer
    header: dict[str, TensorInfo]
    ignored: tuple[str, ...]

    def spec(self, **types) -> ModelSpec:
        """This file as it was read, in these types."""
        return ModelSpec(path=os.path.abspath(self.source.path), file=self.source.state, **types)

    def log_ignored(self) -> None:
        """One line about what is left alone, if anything is."""
        if self.ignored:
            log.info(
                "FastUSP: %s: %d tensors that %s does not use are ignored: %s",
                self.source.path,
                len(self.ignored),
                self.config.family,
                first_of(self.ignored),
            )


def read_model(path: str, state: FileState | None = None) -> ModelFile:
    """What a file says of its model, by its header alone (and its scales). state: which it must have, if any.

    Raises CheckpointError for a file that is missing, truncated or corrupt; that is something else than a model of
    ours; that lacks tensors or has them in another shape; that is quantised in a way that FastUSP does not read; or
    that changes meanwhile.
    """
    source = Source(path)
    change = state.change_to(source.state) if state is not None else ""
    if change:
        raise changed(path, change, "since this workflow loaded it")
    try:
        return _read(source)
    finally:
        source.check("while it was being read")  # else that is what the error is about


def _read(source: Source) -> ModelFile:
    path, marks = source.path, [family.marks for family in FAMILIES]
    contents = with_original_names(read_contents(source, [*marks, MARKS]))
    try:
        family = family_of(contents.tensors, path, contents.names)
    except Incomplete as error:
        refuse_foreign(contents, (name.rpartition(".")[0] for name in error.missing))
        raise
    except CheckpointError:
        refuse_foreign(contents)
        raise
    transformer, names = needed_tensors(family, contents.tensors, path)
    wanted = set(names)
    needed = [key for key in contents.tensors if transformer.module_key(key) in wanted]
    twice = [key for key, n in Counter(map(transformer.module_key, needed)).items() if n > 1]
    if twice:
        raise CheckpointError(f"Use another file: {path} has two tensors for {first_of(twice)}, in two spellings")
    refuse_foreign(contents, (key.rpartition(".")[0] for key in needed))
    header = fold_scales(contents, needed)
    config = family.from_sizes(Sizes(header, path, family.family))
    with torch.device("meta"):
        model = config.build()
    header = _shaped(model, header, path, family.family)
    others = (key for key in contents.tensors if key not in header and not used_for_scales(key, header))
    return ModelFile(source, config, model, header, tuple(others))


def _shaped(model: Transformer, header: dict[str, TensorInfo], path: str, family: str) -> dict[str, TensorInfo]:
    """The tensors in the shapes that the model has them in: writers of GGUF leave out leading dimensions of 1. Raises
    CheckpointError for other shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted = {key: shapes[model.module_key(key)] for key in header}
    problems = [
        f"tensor {key!r} is {info.shape}, expected {wanted[key]}"
        for key, info in header.items()
        if _without_ones(info.shape) != _without_ones(wanted[key])
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} is not a {family} file: {'; '.join(problems[:3])}{more}")
    return {key: replace(info, shape=wanted[key]) for key, info in header.items()}


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.dropwhile(lambda size: size == 1, shape))


def model_and_plans(header: dict[str, TensorInfo], spec: ModelSpec) -> tuple[Transformer, dict[str, StoragePlan]]:
    """The model of a file's tensors, on the meta device, and in which form they lie in memory, as `storage_plans`."""
    with torch.device("meta"):
        model = detect(header, spec.path).build()
    return model, storage_plans(model, header, spec)


def unpacked_plans(
    model: Transformer, plans: dict[str, StoragePlan], spec: ModelSpec, room: float = math.inf
) -> dict[str, StoragePlan]:
    """The forms of a model whose layers compute with what lies in memory, in place of `plans`; the same where they do
    that anyway. Layers of modulations, which are used once a prompt, keep theirs.

    room: the bytes that this may take more; from the first layer on, those that still fit into it.
    """
    seldom = {id(part) for layer in model.modulations() for part in layer.modules()}
    compute, found = getattr(torch, spec.compute), dict(plans)
    for name, plan in plans.items():
        if plan.unpacked_bytes and id(model.get_submodule(name.rpartition(".")[0])) not in seldom:
            wide = plan.unpacked_to(compute)
            if wide.nbytes - plan.nbytes <= room:
                found[name], room = wide, room - (wide.nbytes - plan.nbytes)
    return found


def storage_plans(model: Transformer, header: dict[str, TensorInfo], spec: ModelSpec) -> dict[str, StoragePlan]:
    """In which form each tensor of a model lies in memory, by the module's names. header: its tensors by their names in
    the file."""
    products = set(model.products()) if spec.linear == "fp8" else set()

    def use(name: str) -> Use:
        layer, _, leaf = name.rpartition(".")
        module = model.get_submodule(layer)
        if leaf != "weight" or not isinstance(module, Linear):
            return "other"
        return "fp8_product" if module in products else "linear"

    return {
        name: plan_storage(info, spec, use(name))
        for name, info in ((model.module_key(key), info) for key, info in header.items())
    }
