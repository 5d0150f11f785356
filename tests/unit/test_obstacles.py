"""What keeps a run out of the workers' loop: its sampler, its schedule, its conditioning. (Changes of other packs:
test_rehearsal, test_provenance.)"""

from types import SimpleNamespace

import pytest
import torch

import fastusp_backend.sampling  # noqa: F401 - the nodes take it as a part of their own package

pytestmark = pytest.mark.unit


class Flow:
    """In the place of ComfyUI's CONST, and of the schedules that it makes."""

    multiplier = 1.0

    def calculate_input(self):
        pass

    def calculate_denoised(self):
        pass

    def noise_scaling(self):
        pass

    def timestep(self, sigma):
        return sigma * self.multiplier


class Stock:
    """In the place of the remote transformer."""

    ignored = frozenset(("num_tokens",))

    def shown(self, mask, tokens):
        return mask.sum(1).tolist()


def sample_euler(model, x, sigmas, s_churn=0.0, s_noise=1.0):
    pass


def sample_uni_pc(model, x, sigmas):
    pass


@pytest.fixture
def obstacles(node_module):
    return node_module(
        "obstacles",
        provenance={"owner": lambda value: "the-pack", "names_in": None},
        reachable={"Place": None, "reached": lambda *_: ()},
        call_tracer={"changed_in": lambda *_, every: None},
        comfyui={
            "CONST": Flow,
            "k_diffusion": SimpleNamespace(sample_euler=sample_euler),
            "samplers": SimpleNamespace(KSAMPLER=SimpleNamespace),
        },
        rehearsal={"rehearse": None},
        remote_transformer={"RemoteTransformer": Stock},
        sampler_names={"menu_name": lambda sampler: sampler.sampler_function.__name__},
    )


def sampler(function=sample_euler, **options):
    return SimpleNamespace(sampler_function=function, extra_options=options)


def guider(transformer=None, cfg=4.0, **conds):
    model = SimpleNamespace(diffusion_model=transformer or Stock(), model_sampling=Flow())
    return SimpleNamespace(inner_model=model, cfg=cfg, conds=conds)


def test_a_sampler_of_the_workers_and_one_that_is_none(obstacles):
    assert obstacles.in_sampler(sampler(s_churn=0.0), guider()) is None, "the default of an option says nothing"
    assert obstacles.in_sampler(sampler(s_churn=0.5), guider()) == "no option s_churn of euler in the workers"
    assert obstacles.in_sampler(sampler(sample_uni_pc), guider()) == "no sample_uni_pc in the workers"
    assert obstacles.in_sampler(sampler(), guider(transformer=object())) == "the-pack replaced the transformer"


@pytest.mark.parametrize(
    "sigmas, changes, words",
    [
        ([1.0, 0.5, 0.0], {}, None),
        ([1.0, 0.5, 0.0], {"multiplier": 1000.0}, None),
        ([1.0], {}, "nothing to sample"),
        ([1.0, 0.0], {"noise_scale": 2.0}, "is not a plain rectified flow"),
        ([1.0, 0.0], {"calculate_denoised": lambda self: None}, "is not a plain rectified flow"),
        ([0.5, 0.0], {"timestep": lambda self, sigma: sigma**2 * 3}, "has its own timesteps"),
    ],
)
def test_a_schedule_is_a_plain_flow(obstacles, sigmas, changes, words):
    found = obstacles._in_schedule(type("Changed", (Flow,), changes)(), torch.tensor(sigmas))
    assert found is None if words is None else words in found


def conditioning(mask=None, **more):
    conds = {"c_crossattn": SimpleNamespace(cond=torch.ones(1, 2, 4)), "guidance": None} | more
    if mask is not None:
        conds["attention_mask"] = SimpleNamespace(cond=torch.tensor(mask))
    return [{"model_conds": conds}]


@pytest.mark.parametrize(
    "positive, negative, words",
    [
        (conditioning(), conditioning(), None),
        (conditioning(mask=[[1, 0]]), conditioning(), None),
        (conditioning(num_tokens=3), conditioning(), None),
        (conditioning(mask=[[1, 0], [1, 1]]), conditioning(), "attention_mask on the positive"),
        (conditioning(), conditioning(control=None), "control on the negative"),
        (2 * conditioning(), conditioning(), "2 parts of the positive"),
        (conditioning(), None, "0 parts of the negative"),
        ([{"model_conds": {}}], conditioning(), "no prompt in the positive"),
    ],
)
def test_a_conditioning_is_one_prompt_of_what_the_loop_knows(obstacles, positive, negative, words):
    found = obstacles._in_conditioning(guider(positive=positive, negative=negative))
    assert found is None if words is None else words in found


@pytest.mark.parametrize("ignored, length", [((), 1), (("attention_mask",), 2)])
def test_how_much_of_a_text_counts(obstacles, ignored, length):
    transformer = Stock()
    transformer.ignored = frozenset(ignored)
    assert obstacles.text_length(conditioning(mask=[[1, 0]])[0]["model_conds"], transformer) == length


def test_at_cfg_1_the_negative_conditioning_is_not_evaluated(obstacles):
    given = guider(cfg=1.0, positive=conditioning(), negative=2 * conditioning())
    assert obstacles._in_conditioning(given) is None
    assert [*obstacles.evaluated_conditionings(given)] == ["positive"]
