"""FLUX's further inputs give stock's latents: reference latents, channels of Fill and Canny, ControlNets."""

from dataclasses import replace

import pytest
import torch
from conftest import SMALL
from safetensors.torch import save_file
from workflows import DEV, STEPPING, Comparison, Graph, Link

from fastusp_backend.models.flux import Flux
from fastusp_backend.models.synthetic import random_state, write_flux

pytestmark = pytest.mark.host

LAYOUTS = ((2, 1), (1, 2))
SIZE = (8 * 9, 8 * 14)
"""5 x 7 patches: an odd width."""
KONTEXT = ((48, 80), (72, 56))
LOOP = "loop in the workers"


class Both(Comparison):
    """Adds runs of a stock model and of ours under two layouts."""

    def both(self, label: str, *, file: str = DEV, where: str = LOOP, layouts=LAYOUTS, **inputs) -> None:
        inputs = {"steps": 4, "latent_image": self.graph.empty(*SIZE)} | inputs
        want = self.graph.sample(self.graph.stock(file), **inputs)
        for ulysses, ring in layouts:
            got = self.graph.sample(self.graph.usp("cpu:2", ulysses, ring, file=file), **inputs)
            self.add(f"{label}, {ulysses} x {ring}", got, want, where)


@pytest.mark.any_host
def test_a_reference(host):
    kontext = Both()
    kontext.both("Kontext", positive=kontext.graph.referring(kontext.graph.prompt(), (48, 80)), steps=2)
    kontext.check(host)


@pytest.mark.parametrize("method", [None, "offset", "index", "uxo/uno"])
def test_references(host, method):
    kontext = Both()
    graph = kontext.graph
    positive, negative = graph.prompt(1, 7), graph.prompt(2, 5)
    two = graph.referring(positive, *KONTEXT, method=method)
    kontext.both("two", positive=two)
    kontext.both("stepping", positive=two, sampler_name="uni_pc", where=STEPPING, layouts=LAYOUTS[:1])
    one = graph.referring(negative, KONTEXT[0], method=method)
    kontext.both("cfg, two and one", positive=two, negative=one, cfg=2.0, layouts=LAYOUTS[:1])
    batch = {"latent_image": graph.latent(*SIZE, 2, masked=True), "denoise": 0.7}
    kontext.both("batch of two, masked", positive=two, **batch)
    if method is None:
        alike = graph.referring(graph.prompt(2, 7), *KONTEXT)
        stepped = {"sampler_name": "uni_pc", "where": STEPPING, "cfg": 2.0}
        kontext.both("cfg, evaluated together", positive=two, negative=alike, **stepped)
        kontext.both("cfg, one by one", positive=two, negative=negative, **stepped)
    kontext.check(host)


@pytest.fixture(scope="module", params=[16, 80], ids=["Canny", "Fill"])
def channels(request, host):
    path = host.base / f"models/diffusion_models/channels{request.param}.safetensors"
    write_flux(str(path), replace(SMALL, concat_channels=request.param), seed=2)
    yield path.name
    path.unlink()


def test_channels(host, channels):
    """Of another size than the image, with a mask, without any, and where ComfyUI cuts them into areas."""
    fill = Both()
    graph = fill.graph
    image, mask = graph.latent(64, 96), graph.node("SolidMask", value=0.7, width=64, height=96)
    positive, negative = (
        graph.node("TestInpaintConditioning", conditioning=graph.prompt(seed, 7), latent=image, mask=mask)
        for seed in (1, 2)
    )
    inputs = {"file": channels, "negative": negative}
    fill.both("loop", positive=positive, **inputs)
    fill.both("nothing given", positive=graph.prompt(), **inputs, layouts=LAYOUTS[:1])
    masked = graph.latent(*SIZE, 2, masked=True)
    fill.both("masked batch, cfg", positive=positive, latent_image=masked, cfg=2.0, **inputs)
    area = graph.node("ConditioningSetArea", conditioning=positive, width=64, height=64, x=8, y=32, strength=1.0)
    both = graph.node("ConditioningCombine", conditioning_1=area, conditioning_2=positive)
    fill.both("area", positive=both, cfg=2.0, where=STEPPING, layouts=LAYOUTS[:1], **inputs)
    fill.check(host)


@pytest.fixture(scope="module")
def control_net(host):
    """A small ControlNet of XLabs' kind: it needs no VAE, and ComfyUI repeats its one block's residual 19 times."""
    hidden, generator = SMALL.hidden, torch.Generator().manual_seed(7)
    with torch.device("meta"):
        model = Flux(SMALL)
    state = random_state(model, seed=3, dtype=torch.float32)
    left_out = ("single_blocks", "final_layer")
    tensors = {Flux.file_key(name): t for name, t in state.items() if not name.startswith(left_out)}

    def add(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * torch.tensor(shape[1:]).prod() ** -0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.02

    add("controlnet_blocks.0", hidden, hidden)
    add("pos_embed_input", hidden, 64)
    for number in range(8):
        add(f"input_hint_block.{2 * number}", 16, 16 if number else 3, 3, 3)
    folder = host.base / "models/controlnet"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "control.safetensors")
    return "control.safetensors"


def applied(graph: Graph, file: str, positive: Link, negative: Link, **options) -> tuple[Link, Link]:
    net = graph.node("ControlNetLoader", control_net_name=file)
    image = graph.node("EmptyImage", width=64, height=64, batch_size=1, color=0x40A0F0)
    options = {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0} | options
    both = {"positive": positive, "negative": negative}
    positive = graph.node("ControlNetApplyAdvanced", **both, control_net=net, image=image, **options)
    return positive, [positive[0], 1]


def test_control_net(host, control_net):
    control = Both()
    graph = control.graph
    plain, other = graph.prompt(1, 7), graph.prompt(2, 5)
    positive, negative = applied(graph, control_net, plain, other)
    alike = applied(graph, control_net, plain, graph.prompt(2, 7))[1]
    for label, inputs in (
        ("cfg 1", {"positive": positive}),
        ("cfg", {"positive": positive, "negative": negative, "cfg": 2.0}),
        ("cfg, evaluated together", {"positive": positive, "negative": alike, "cfg": 2.0}),
        ("early", {"positive": applied(graph, control_net, plain, other, end_percent=0.5)[0]}),
        ("twice", {"positive": applied(graph, control_net, positive, negative, strength=0.3)[0]}),
        ("with references", {"positive": graph.referring(positive, *KONTEXT)}),
    ):
        # ComfyUI's own ControlNet takes no odd number of latent pixels.
        control.both(label, **inputs, latent_image=graph.empty(80, 112), where=STEPPING)
    control.check(host)


def test_control_after_single_blocks_and_other_parts(host):
    """Residuals that change from step to step, in a list that is longer than the blocks; an area of its own."""
    control = Both()
    graph = control.graph
    applied = graph.node("TestAppliedControl", conditioning=graph.prompt(), hidden=SMALL.hidden, blocks=3)
    plain = graph.prompt(2)
    control.both("residuals", positive=applied, where=STEPPING)
    area = graph.node("ConditioningSetArea", conditioning=applied, width=64, height=64, x=8, y=32, strength=1.0)
    both = graph.node("ConditioningCombine", conditioning_1=area, conditioning_2=plain)
    control.both("area", positive=both, where=STEPPING, layouts=LAYOUTS[:1])
    batch = graph.latent(*SIZE, 2, masked=True)
    control.both("batch", positive=applied, latent_image=batch, where=STEPPING, layouts=LAYOUTS[:1])
    control.check(host)


def test_special_conditioning_with_references(host):
    special = Both()
    graph = special.graph
    first, second = graph.referring(graph.prompt(1, 7), KONTEXT[0]), graph.prompt(2, 7)
    mask = graph.node("SolidMask", value=0.5, width=SIZE[0], height=SIZE[1])
    early = graph.node("ConditioningSetTimestepRange", conditioning=first, start=0.0, end=0.5)
    late = graph.node("ConditioningSetTimestepRange", conditioning=second, start=0.5, end=1.0)
    masked = graph.node("ConditioningSetMask", conditioning=first, mask=mask, strength=0.7, set_cond_area="default")
    area = graph.node("ConditioningSetArea", conditioning=first, width=64, height=64, x=8, y=32, strength=0.8)
    for label, parts in (("range", (early, late)), ("mask", (masked, second)), ("area", (area, second))):
        positive = graph.node("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])
        special.both(label, positive=positive, negative=second, cfg=2.0, where=STEPPING, layouts=LAYOUTS[:1])
    special.check(host)
