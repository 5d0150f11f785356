"""FLUX's further inputs give stock's latents: reference latents, channels of Fill and Canny, ControlNets."""

from dataclasses import replace

import pytest
from controlnets import DEEP, applied, write_union, write_xlabs
from workflows import DEV, SMALL, STEPPING, Comparison, difference

from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.host

LAYOUTS = ((2, 1), (1, 2))
SIZE = (8 * 9, 8 * 14)
"""5 x 7 patches: an odd width."""
KONTEXT = ((48, 80), (72, 56))
LOOP = "loop in the workers"


class Both(Comparison):
    """Adds runs of a stock model and of ours under two layouts."""

    def both(self, label: str, *, file: str = DEV, where: str = LOOP, layouts=LAYOUTS, **inputs) -> None:
        inputs = {"steps": 2, "latent_image": self.graph.empty(*SIZE)} | inputs
        want = self.graph.sample(self.graph.stock(file), **inputs)
        for ulysses, ring in layouts:
            got = self.graph.sample(self.graph.usp("cpu:2", ulysses, ring, file=file), **inputs)
            self.add(f"{label}, {ulysses} x {ring}", got, want, where)


@pytest.mark.any_host
def test_a_reference(host):
    kontext = Both()
    kontext.both("Kontext", positive=kontext.graph.referring(kontext.graph.prompt(), (48, 80)))
    kontext.check(host)


@pytest.mark.parametrize("method", [None, "offset", "index", "uxo/uno"])
def test_references(host, method):
    """With the model's own method in all kinds of runs; with each other one in the loop and stepping."""
    kontext = Both()
    graph = kontext.graph
    positive, negative = graph.prompt(1, 7), graph.prompt(2, 5)
    two = graph.referring(positive, *KONTEXT, method=method)
    kontext.both("two", positive=two)
    kontext.both("stepping", positive=two, sampler_name="uni_pc", where=STEPPING, layouts=LAYOUTS[:1])
    if method is None:
        one, alike = graph.referring(negative, KONTEXT[0]), graph.referring(graph.prompt(2, 7), *KONTEXT)
        kontext.both("cfg, two and one", positive=two, negative=one, cfg=2.0, layouts=LAYOUTS[:1])
        batch = {"latent_image": graph.latent(*SIZE, 2, masked=True), "denoise": 0.7}
        kontext.both("batch of two, masked", positive=two, **batch, layouts=LAYOUTS[1:])
        stepped = {"sampler_name": "uni_pc", "where": STEPPING, "cfg": 2.0}
        kontext.both("cfg, evaluated together", positive=two, negative=alike, **stepped, layouts=LAYOUTS[:1])
        kontext.both("cfg, one by one", positive=two, negative=negative, **stepped, layouts=LAYOUTS[1:])
    kontext.check(host)


@pytest.fixture(scope="module", params=[16, 80], ids=["Canny", "Fill"])
def channels(request, host):
    path = host.base / f"models/diffusion_models/channels{request.param}.safetensors"
    write_checkpoint(str(path), replace(SMALL, concat_channels=request.param), seed=2)
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
    fill.both("masked batch, cfg", positive=positive, latent_image=masked, cfg=2.0, **inputs, layouts=LAYOUTS[1:])
    area = graph.node("ConditioningSetArea", conditioning=positive, width=64, height=64, x=8, y=32, strength=1.0)
    both = graph.node("ConditioningCombine", conditioning_1=area, conditioning_2=positive)
    fill.both("area", positive=both, cfg=2.0, where=STEPPING, layouts=LAYOUTS[:1], **inputs)
    fill.check(host)


@pytest.fixture(scope="module")
def control_net(host):
    return write_xlabs(host.base / "models/controlnet")


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
        layouts = LAYOUTS if label == "cfg" else LAYOUTS[:1]
        control.both(label, **inputs, latent_image=graph.empty(80, 112), where=STEPPING, layouts=layouts)
    control.check(host)


def test_union_control_nets(host):
    """Several residuals, each for some blocks; on a part of the steps alone; two ControlNets on one prompt."""
    models = host.base / "models"
    write_checkpoint(str(models / "diffusion_models/deep.safetensors"), DEEP, seed=2)
    union = write_union(models / "controlnet")
    control = Both()
    graph = control.graph
    plain, other = graph.prompt(1, 7), graph.prompt(2, 5)
    common = {"vae": "image", "strength": 0.6}
    positive, negative = applied(graph, union, plain, other, mode="depth", **common)
    late = applied(graph, union, plain, other, mode="auto", start_percent=0.3, end_percent=0.7, **common)[0]
    two = applied(graph, union, positive, negative, mode="openpose", **common)
    latent = graph.empty(80, 112)
    for label, layouts, inputs in (
        ("cfg", LAYOUTS[1:], {"positive": positive, "negative": negative, "cfg": 2.0}),
        ("late", LAYOUTS[:1], {"positive": late}),
        ("two", LAYOUTS[:1], {"positive": two[0], "negative": two[1]}),
    ):
        inputs |= {"steps": 2, "latent_image": latent, "where": STEPPING, "layouts": layouts}
        control.both(label, file="deep.safetensors", **inputs)
    stock = graph.stock("deep.safetensors")
    runs = [graph.sample(stock, steps=2, positive=p, latent_image=latent) for p in (plain, late, positive, two[0])]
    saved = [graph.save(run) for run in runs]
    latents = control.check(host).latents
    for one, another in zip(saved, saved[1:], strict=False):
        assert difference(latents[one], latents[another]) > 1e-2  # they all count
    (models / "diffusion_models/deep.safetensors").unlink()


def test_control_after_single_blocks_and_other_parts(host):
    """Residuals that change from step to step, in a list that is longer than the blocks; an area of its own."""
    control = Both()
    graph = control.graph
    applied = graph.node("TestAppliedControl", conditioning=graph.prompt(), hidden=SMALL.hidden, blocks=3)
    plain = graph.prompt(2)
    control.both("residuals", positive=applied, steps=3, where=STEPPING)
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
        special.both(label, positive=positive, negative=second, cfg=2.0, steps=4, where=STEPPING, layouts=LAYOUTS[:1])
    special.check(host)
