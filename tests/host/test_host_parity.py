"""The same latents as stock UNETLoader + KSampler, with the loop in the workers: samplers, layouts, sizes, prompts."""

import shutil

import pytest
from workflows import IN_WORKERS, SCHNELL, STEPPING, WIDE, Comparison

from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.host

LOOP_SAMPLERS = ("euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "res_multistep", "lcm", "ddim")
LAYOUTS = {"cpu:1": ((1, 1),), "cpu:2": ((2, 1), (1, 2)), "cpu:3": ((1, 3),), "cpu:4": ((2, 2), (4, 1), (1, 4))}


@pytest.mark.any_host
def test_ksampler_and_usp_sampler(host):
    both = Comparison()
    graph = both.graph
    usp, stock = graph.usp(), graph.stock()
    for name, nodes, where in (
        ("euler", ("KSampler", "FastUSPSampler"), IN_WORKERS),
        ("euler_ancestral", ("FastUSPSampler",), IN_WORKERS),
        ("uni_pc", ("KSampler",), STEPPING),
    ):
        inputs = {"sampler_name": name, "steps": 4}
        want = graph.sample(stock, **inputs)
        for node in nodes:
            both.add(f"{node} {name}", graph.sample(usp, node=node, **inputs), want, where)
    both.check(host)


@pytest.mark.any_host
def test_usp_sampler_samples_a_stock_model_as_ksampler_does(host):
    both = Comparison()
    stock = both.graph.stock()
    inputs = {"steps": 3, "cfg": 2.0, "sampler_name": "dpmpp_2m"}
    got, want = both.graph.sample(stock, node="FastUSPSampler", **inputs), both.graph.sample(stock, **inputs)
    got, want = both.graph.save(got), both.graph.save(want)
    outcome = host.run(both.graph)
    assert outcome.latents[got].equal(outcome.latents[want])
    assert not outcome.texts


@pytest.mark.any_host
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be GPUs here")
def test_a_workflow_for_all_gpus_runs_where_there_is_none(host):
    both = Comparison()
    graph = both.graph
    for name, where in (("euler", "on cpu:1, loop in the workers"), ("uni_pc", STEPPING)):
        inputs = {"sampler_name": name, "steps": 3}
        got, want = graph.sample(graph.usp("auto"), **inputs), graph.sample(graph.stock(), **inputs)
        both.add(name, got, want, where)
    both.check(host)


@pytest.mark.parametrize(
    ("cfg", "node"), [pytest.param(1.0, "KSampler", marks=pytest.mark.thorough), (3.0, "FastUSPSampler")]
)
def test_loop_samplers(host, cfg, node):
    """Over 20 steps, as the bound on the difference has them."""
    samplers = Comparison()
    graph = samplers.graph
    usp, stock = graph.usp(), graph.stock()
    inputs = {"positive": graph.prompt(1), "negative": graph.prompt(2), "latent_image": graph.empty(), "cfg": cfg}
    for name in LOOP_SAMPLERS:
        got = graph.sample(usp, node=node, sampler_name=name, **inputs)
        samplers.add(name, got, graph.sample(stock, sampler_name=name, **inputs))
    samplers.check(host)


@pytest.mark.thorough
def test_layouts_where_nothing_divides(host):
    path = host.base / "models/diffusion_models/wide.safetensors"
    write_checkpoint(str(path), WIDE)
    layouts = Comparison()
    graph = layouts.graph
    sizes = {"positive": graph.prompt(1, 7), "negative": graph.prompt(2, 5), "latent_image": graph.empty(120, 136)}
    one, two = {"cfg": 1.0, "steps": 6, **sizes}, {"cfg": 2.0, "steps": 3, **sizes}
    stock = graph.stock(path.name)
    want, want_two = graph.sample(stock, **one), graph.sample(stock, **two)
    for gpus, degrees in LAYOUTS.items():
        for ulysses, ring in degrees:
            usp, layout = (
                graph.usp(gpus, ulysses, ring, file=path.name),
                f"ulysses {ulysses} x ring {ring} on {gpus}, loop in the workers",
            )
            layouts.add(layout, graph.sample(usp, **one), want, layout)
            layouts.add(f"{layout}, cfg", graph.sample(usp, **two), want_two, layout)
    layouts.check(host)
    path.unlink()


def test_images_batches_and_masks(host):
    """Odd sizes, img2img, inpainting; cfg with prompts of one length (evaluated together) and of two."""
    images = Comparison()
    graph = images.graph
    ours, stock = {gpus: graph.usp(gpus) for gpus in ("cpu:2", "cpu:3")}, graph.stock()
    masked, plain = graph.latent(8 * 15, 8 * 17, 2, masked=True), graph.latent(8 * 15, 8 * 17, 2)
    even, odd = graph.prompt(2, 7), graph.prompt(2, 10)
    inputs = {"steps": 3, "positive": graph.prompt(1, 7)}
    for gpus, name, latent, denoise, cfg, negative in (
        ("cpu:2", "euler", plain, 0.6, 1.0, even),
        ("cpu:3", "dpmpp_2m", plain, 1.0, 2.0, odd),
        ("cpu:3", "euler", masked, 1.0, 2.0, even),
        ("cpu:3", "euler_ancestral", masked, 0.6, 1.0, even),
        ("cpu:2", "ddim", masked, 0.8, 1.0, even),
        ("cpu:2", "heun", masked, 0.7, 2.0, odd),
    ):
        more = {"sampler_name": name, "latent_image": latent, "denoise": denoise, "cfg": cfg, "negative": negative}
        label = f"{gpus} {name} denoise {denoise} cfg {cfg} {'masked' if latent is masked else ''}"
        images.add(label, graph.sample(ours[gpus], **inputs, **more), graph.sample(stock, **inputs, **more))
    images.check(host)


def test_schedulers(host):
    schedulers = Comparison()
    graph = schedulers.graph
    usp, stock = graph.usp(), graph.stock()
    (names, *_) = host.get("/object_info/KSampler")["KSampler"]["input"]["required"]["scheduler"]
    assert len(names) > 5 and "test_squares" in names
    for name in names:
        inputs = {"scheduler": name, "steps": 3, "sampler_name": "dpmpp_2m"}
        schedulers.add(name, graph.sample(usp, **inputs), graph.sample(stock, **inputs))
    schedulers.check(host)


def test_schnell(host):
    schnell = Comparison()
    graph = schnell.graph
    stock = graph.stock(SCHNELL)
    for inputs, (ulysses, ring) in zip(
        ({"steps": 4}, {"steps": 6, "cfg": 2.0, "sampler_name": "res_multistep"}), LAYOUTS["cpu:2"], strict=True
    ):
        usp = graph.usp("cpu:2", ulysses, ring, file=SCHNELL)
        schnell.add(f"{ulysses}x{ring} {inputs}", graph.sample(usp, **inputs), graph.sample(stock, **inputs))
    schnell.check(host)


def test_text_of_any_length(host):
    texts = Comparison()
    graph = texts.graph
    stock = graph.stock()
    layouts = ("cpu:2", 2, 1), ("cpu:2", 1, 2), ("cpu:3", 1, 3)
    for n, tokens in enumerate((1, 7, 24, 301, 512)):
        inputs = {"positive": graph.prompt(tokens, tokens), "steps": 2}
        want = graph.sample(stock, **inputs)
        for gpus, ulysses, ring in (layouts[n % 3], layouts[(n + 1) % 3]):
            usp = graph.usp(gpus, ulysses, ring)
            texts.add(f"{tokens} tokens, {ulysses}x{ring}", graph.sample(usp, **inputs), want)
    texts.check(host)
