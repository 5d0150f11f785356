"""Modulations whose layers are spread over the ranks: the rows of one rank to the bit, whatever is kept and dropped."""

from itertools import chain, product

import pytest
import torch
import torch.distributed as dist
from pools import GIVEN, PROMPT, evaluate, run_ranks, session
from support import SMALL, SMALL_CHROMA, SMALL_QWEN, inputs, load_model, randn, relative_difference, spec_of
from test_patches import looped, patched

from fastusp_backend.config import Layout, Settings, WeightPatch
from fastusp_backend.engine import modulations
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.engine.modulations import CACHED_ROWS, ModulationTable
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import NO_PATCHES, Progress, Session, WeightPatches, name_of
from fastusp_backend.prompt import Prompt
from fastusp_backend.weights.reading import read_tensors

pytestmark = pytest.mark.dist

CPU = torch.device("cpu")
TOLERANCE = 2e-5
ALL, NONE = slice(None), slice(0, 0)


CONFIGS = {"flux": SMALL, "qwen": SMALL_QWEN, "chroma": SMALL_CHROMA}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = tmp_path_factory.mktemp("modulations") / "qwen.safetensors"
    write_checkpoint(str(path), SMALL_QWEN, seed=3)
    return path


@pytest.fixture(scope="module")
def chroma(tmp_path_factory):
    path = tmp_path_factory.mktemp("modulations") / "chroma.safetensors"
    write_checkpoint(str(path), SMALL_CHROMA, seed=4)
    return path


def prompts_of(config) -> list[Prompt]:
    """Two of two images each; Qwen-Image's first one has references at timestep 0."""
    made = []
    for seed in range(2):
        given = inputs(config, text=3, size=(4, 4), batch=2, seed=seed)
        references = (randn(2, 16, 2, 2, seed=9),) if config is SMALL_QWEN and seed == 0 else ()
        method = "index_timestep_zero" if references else None
        made.append(Prompt(given.context, given.y, given.guidance, None, references, method))
    return made


def _compare(rank: int, ranks: int, folder: str, paths: dict[str, str]) -> None:
    torch.set_num_threads(1)
    alone = {name: load_model(spec_of(path), CPU) for name, path in paths.items()}
    for parameter in chain.from_iterable(model.parameters() for model in alone.values()):
        parameter.data = parameter.data.clone()  # memory aligned as that of `held`, or products may sum otherwise
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    modulations.ROWS_AT_ONCE, modulations.CACHED_ROWS = 5, 8
    for name, path in paths.items():
        checkpoint = Checkpoint(spec_of(path), rank, ranks)
        checkpoint.allocate(CPU, dist.group.WORLD)
        # As GPUs read: shares of what all hold, then what is this rank's own.
        checkpoint._pieces = lambda *given, source=checkpoint.source: read_tensors(source, *given, CPU)
        held, group = checkpoint.read(), rank % 2
        for layer, tensor in alone[name].named_parameters():
            mine = held.get_parameter(layer)
            assert mine.is_meta != checkpoint.is_local(layer) and (mine.is_meta or torch.equal(mine, tensor)), layer
        for mine in (  # of both prompts, of the group's prompt, of the group's image of one prompt
            [ALL, ALL],
            [NONE if group else ALL, ALL if group else NONE],
            [slice(group, group + 1)],
        ):
            prompts = prompts_of(CONFIGS[name])[: len(mine)]
            own = ModulationTable(held, torch.float32, checkpoint.ownership.owners)
            whole = ModulationTable(alone[name], torch.float32, None)

            def check(*timesteps: float, tables=(own, whole), of=(prompts, mine)) -> None:
                for pairs in zip(*(table.rows(timesteps, *of) for table in tables), strict=True):
                    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))

            # As many rows of a network that one rank has, as all gather, take as much as three times as many others.
            assert own._at_once == (1 if name == "chroma" else 5)
            for table in (own, whole):
                table.prepare([0.9, 0.7, 0.9, 0.5], prompts, mine)
            for timesteps in ((0.9, 0.9), (0.2, 0.9), (0.0, 0.0), (0.5, 0.5), (0.2, 0.9)):
                check(*timesteps)
            for n, table in product(range(11), (own, whole)):
                table.rows((n / 99, 0.4), prompts[:1], mine[:1])
            kept = own._rows[prompts[0]]
            assert len(kept) == 8 and list(kept)[-1] == (n / 99, 0.4)
            assert ((0.0, 0.0) in kept) == (name == "qwen")
            check(0.9, 0.9)
            for table in (own, whole):
                table.forget()
            check(0.9, 0.9)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "names", [("qwen", "chroma"), pytest.param(("flux",), marks=pytest.mark.thorough)], ids=" ".join
)
def test_rows_are_one_ranks_to_the_bit(dev, qwen, chroma, tmp_path, names):
    paths = {"flux": str(dev), "qwen": str(qwen), "chroma": str(chroma)}
    run_ranks(_compare, 3, str(tmp_path), {name: paths[name] for name in names}, ranks=3)


MODULATIONS = {
    "double_blocks.0.img_mod.lin.weight": (3072, 512),
    "double_blocks.1.txt_mod.lin.weight": (3072, 512),
    "single_blocks.0.modulation.lin.weight": (1536, 512),
    "single_blocks.1.modulation.lin.weight": (1536, 512),
    "final_layer.adaLN_modulation.1.weight": (1024, 512),
}


def test_patches_of_modulations_leave_no_trace(shared_pool, park, dev):
    """In both paths, with the prompt kept by the workers, and across parking."""
    pool, one = shared_pool(2), shared_pool(1)
    tensors, weights = {}, {}
    for seed, (key, (out, width)) in enumerate(MODULATIONS.items()):
        up, down = randn(out, 4, seed=seed) * 0.05, randn(4, width, seed=seed + 50)
        roles = {"up": name_of(up), "down": name_of(down)}
        weights[key] = (WeightPatch(kind="lora", tensors=roles, strength=1.0),)
        tensors |= {roles["up"]: up, roles["down"]: down}
    lora = WeightPatches(weights, tensors)
    evaluate(pool, dev)
    park(pool)
    plain, plain_loop = evaluate(pool, dev), looped(pool, dev, NO_PATCHES)
    got, got_loop = patched(pool, dev, lora), looped(pool, dev, lora)
    assert relative_difference(got, plain) > 1e-2
    assert relative_difference(got, patched(one, dev, lora)) < TOLERANCE
    assert relative_difference(got_loop, looped(one, dev, lora)) < TOLERANCE
    park(pool)
    assert torch.equal(patched(pool, dev, lora), got)
    assert torch.equal(evaluate(pool, dev), plain) and torch.equal(looped(pool, dev, NO_PATCHES), plain_loop)


def test_more_timesteps_than_are_kept(shared_pool, dev):
    """Evaluation by evaluation, back to the first ones, with two prompts in turn. Each group has an image."""
    timesteps = [n / (CACHED_ROWS + 6) for n in range(CACHED_ROWS + 6)]
    results = []
    for where in (Layout(batch=2, ulysses=1, ring=1), Layout(ulysses=1, ring=1)):
        run = session(shared_pool(where.ranks), dev, where)
        x, two = torch.cat([GIVEN.x, -GIVEN.x]), Prompt(*(torch.cat([t, t]) for t in PROMPT.tensors().values()))
        other = Prompt(two.context * 0.5, two.y, two.guidance)
        results.append([])
        for n, t in enumerate([*timesteps, *timesteps[:3]]):
            compared = n % 9 == 0 or n >= len(timesteps)
            if where.ranks > 1 or compared:  # of the one rank nothing else is wanted
                velocity = run.evaluate(x, torch.tensor([t, 1 - t]), other if n % 7 == 0 else two, Progress())
                results[-1] += [velocity] if compared else []
    for got, expected in zip(*results, strict=True):
        assert relative_difference(got, expected) < TOLERANCE


@pytest.mark.thorough
def test_a_loop_of_more_timesteps_than_are_kept(shared_pool, qwen):
    """Each group has a prompt of its own."""
    results = []
    for where in (Layout(batch=2, ulysses=1, ring=1), Layout(ulysses=1, ring=1)):
        loop = Session(shared_pool(where.ranks), spec_of(qwen), (where,), Settings())
        given, negative = (inputs(SMALL_QWEN, text=n, size=(4, 6), seed=n) for n in (5, 2))
        references = (randn(1, 16, 3, 3, seed=1),)
        positive = Prompt(given.context, references=references, reference_method="index_timestep_zero")
        sigmas = torch.linspace(1, 0, CACHED_ROWS + 3)
        guided = {"positive": positive, "negative": Prompt(negative.context), "cfg": 2.0}
        results.append(loop.sample(given.x, sigmas, sampler="euler", **guided))
    assert relative_difference(*results) < TOLERANCE
