"""What other packs change around a model counts, with stock's result, or is refused by name; what changes nothing costs
nothing."""

import sys

import pytest
from comfy import PromptFailed
from test_host_errors import failure, short_run
from workflows import IN_WORKERS, STEPPING, TOLERANCE, Comparison, Graph, difference

pytestmark = pytest.mark.host

AROUND = {
    "forward": "changed transformer.forward",
    "forward hook": "hooks into the transformer",
    "apply_model": "changed Flux.apply_model",
    "apply_model, no function": "changed Flux.apply_model",
    "apply_model, partial": "changed Flux.apply_model",
    "model_sampling": "changed ModelSampling.calculate_denoised",
    "timestep": "changed ModelSampling.timestep",
    "cfg_function": "changed samplers.cfg_function",
    "sampling_function": "changed samplers.sampling_function",
    "CFGGuider": "changed CFGGuider.predict_noise",
    "to_d": "changed k_diffusion.sampling.to_d",
    "sample_euler": "changed k_diffusion.sampling.sample_euler",
}


def changed(graph: Graph, model, change: str, **inputs):
    return graph.sample(model, node="TestChangedSampling", change=change, **({"steps": 2, "cfg": 2.0} | inputs))


@pytest.mark.any_host
def test_a_change_around_the_model_counts(host):
    comparison = Comparison()
    graph = comparison.graph
    plain, usp, stock = [], graph.usp(), graph.stock()
    for change, name in AROUND.items():
        comparison.add(change, *(changed(graph, model, change, steps=1) for model in (usp, stock)), STEPPING)
        plain.append((change, name))
    unchanged = graph.sample(stock, steps=1, cfg=2.0)
    saved = graph.save(unchanged)
    comparison.add("plain, after all that", graph.sample(usp, steps=1, cfg=2.0), unchanged)
    outcome = comparison.check(host)
    log = host.log_text()
    for (change, name), (*_, got, _) in zip(plain, comparison.pairs, strict=False):
        by = "functools.partial" if change == "apply_model, partial" else "fastusp-test-pack"
        assert f"{STEPPING}{by} {name}" in log, change
        if change not in ("apply_model, partial", "timestep"):
            assert difference(outcome.latents[got], outcome.latents[saved]) > 1e-4, change


def test_a_change_of_what_a_sampler_uses_counts(host):
    comparison = Comparison()
    graph = comparison.graph
    usp, stock = graph.usp(), graph.stock()
    for change, sampler, where in (
        ("noise_scaling", "lcm", STEPPING),
        ("CONST.noise_scaling", "lcm", STEPPING),
        ("append_dims", "euler", STEPPING),
        ("eta", "euler_ancestral", IN_WORKERS),
        ("callback", "euler", STEPPING),
        ("profiler", "euler", STEPPING),
    ):
        if change == "profiler" and sys.version_info >= (3, 12):
            continue  # there it does not hinder
        got, want = (changed(graph, model, change, sampler_name=sampler, steps=4) for model in (usp, stock))
        comparison.add(change, got, want, where)
    comparison.check(host)


def test_what_changes_nothing_costs_nothing(host):
    comparison = Comparison()
    graph = comparison.graph
    usp, stock = graph.usp(), graph.stock()
    want = graph.sample(stock, steps=2, cfg=2.0)
    harmless = ("eval", "get_torch_device", "get_free_memory", "other models' blocks", "attention")
    for change in (*harmless, "note on the transformer"):
        comparison.add(change, changed(graph, usp, change), want)
    patched = [graph.node("TestChangedModel", model=model, change="unread patches") for model in (usp, stock)]
    got, want = (graph.sample(model, steps=2, cfg=2.0) for model in patched)
    comparison.add("patches that FLUX does not read", got, want)
    comparison.check(host)
    assert "comfy.ldm.flux.math.optimized_attention was replaced by fastusp-test-pack; it has no" in host.log_text()


def test_a_change_that_a_model_carries_counts(host):
    comparison = Comparison()
    graph = comparison.graph
    usp, stock = graph.usp(), graph.stock()

    def run(model, change):
        return graph.sample(graph.node("TestChangedModel", model=model, change=change), steps=2, cfg=2.0)

    for change, where in (
        ("object patch", STEPPING),
        ("function", STEPPING),
        ("two parts", STEPPING),
        ("sigmas", IN_WORKERS),
        ("own key", IN_WORKERS),
        ("own option", IN_WORKERS),
        ("empty", IN_WORKERS),
    ):
        comparison.add(change, run(usp, change), run(stock, change), where)
    noted = graph.node("TestNotedConditioning", conditioning=graph.prompt())
    inputs = {"positive": noted, "negative": noted, "steps": 3, "cfg": 2.0}
    comparison.add("note in a prompt", graph.sample(usp, **inputs), graph.sample(stock, **inputs))
    renorm = {"cfg_trunc": 100.0, "renorm_cfg": 1.0}
    usp, stock = (graph.node("RenormCFG", model=model, **renorm) for model in (usp, stock))
    inputs = {"steps": 3, "cfg": 2.0}
    comparison.add("RenormCFG", graph.sample(usp, **inputs), graph.sample(stock, **inputs), STEPPING)
    comparison.check(host)
    log = host.log_text()
    assert log.count("test_pack_settings (fastusp-test-pack) on the model: nothing reads it") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("forward_orig", ["USP Loader has no 'forward_orig'"]),
        ("set forward_orig", ["Remove the node that asks for a change inside the transformer (forward_orig)"]),
        ("set blocks", ["Remove the node that asks for a change inside the transformer (double_blocks)"]),
        ("set of the class", ["Remove the node that asks for a change inside the transformer (forward_orig)"]),
        ("add module", ["Remove the node that asks for a change inside the transformer (double_blocks)"]),
        ("as PuLID", ["Remove the node that asks for a change inside the transformer (forward_orig)"]),
        ("mock", ["Load the model with Load Diffusion Model", "does not have the attribute 'forward_orig'"]),
        ("set class", ["Remove the node that asks for a change inside the transformer (__class__)"]),
        ("stock's forward_orig", ["comfy.ldm.flux.model.Flux.forward_orig", "Disable fastusp-test-pack"]),
        ("stock's blocks", ["comfy.ldm.flux.model.DoubleStreamBlock", "Disable fastusp-test-pack"]),
    ],
)
def test_a_change_that_cannot_count_is_refused_and_leaves_nothing(host, change, words):
    graph = Graph()
    usp = graph.usp()
    graph.save(changed(graph, usp, change))
    with pytest.raises(PromptFailed) as error:
        host.run(graph)
    assert all(word in error.value.text for word in words), error.value.text
    comparison = Comparison()
    graph = comparison.graph
    inputs = {"steps": 2, "seed": sum(map(ord, change))}  # a prompt that is not cached
    comparison.add("the next one", graph.sample(graph.usp(), **inputs), graph.sample(graph.stock(), **inputs))
    comparison.check(host)


def test_a_block_that_is_patched_while_the_model_runs(host):
    graph = Graph()
    model = graph.node("TestChangedModel", model=graph.usp(), change="patched in the run")
    assert "fastusp-test-pack's change of comfy.ldm.flux.layers.DoubleStreamBlock.forward" in failure(
        host, graph, model
    )


def test_a_key_that_the_transformer_reads(host):
    graph = Graph()
    model = graph.node("TestChangedModel", model=graph.usp(), change="read key")
    assert "patch inside the transformer (patches_replace: dit)" in failure(host, graph, model)


def test_a_function_around_a_weight(host):
    graph = Graph()
    model = graph.node("TestChangedModel", model=graph.usp(), change="weight wrapper")
    assert "function around a weight (diffusion_model.img_in.weight)" in failure(host, graph, model)


def test_the_stand_in_answers_as_stock_does(host, flux2, chroma, qwen, sd3, z_image):
    for file in (None, flux2, chroma, qwen, sd3, z_image):
        graph = Graph()
        named = {} if file is None else {"file": file}
        model = graph.node("TestSameFacts", model=graph.usp(**named), stock=graph.stock(**named))
        graph.node("PreviewAny", source=model)
        host.run(graph)


@pytest.mark.thorough
def test_torch_compile_model(host):
    """It has nothing to compile here, and hinders nobody."""
    comparison = Comparison()
    graph = comparison.graph
    compiled = graph.node("TorchCompileModel", model=graph.usp(), backend="inductor")
    want = graph.sample(graph.stock(), steps=3, seed=41)
    comparison.add("compiled", graph.sample(compiled, steps=3, seed=41), want, STEPPING)
    comparison.check(host)


def test_model_compute_dtype(host):
    """What 16 bits make of the picture is what they make of stock's: guidance and timesteps, rounded, weigh most."""
    graph = Graph()
    usp, stock = graph.usp(), graph.stock()
    runs = {}
    for name, model, dtype in (("usp", usp, "bf16"), ("stock", stock, "bf16"), ("wide", stock, "fp32")):
        computing = graph.node("ModelComputeDtype", model=model, dtype=dtype)
        runs[name] = graph.save(graph.sample(computing, steps=3))
    again = graph.save(graph.sample(graph.node("ModelComputeDtype", model=usp, dtype="default"), steps=3))
    latents = host.run(graph).latents
    rounding = difference(latents[runs["stock"]], latents[runs["wide"]])
    assert 1e-2 < rounding < 0.5
    assert difference(latents[runs["usp"]], latents[runs["stock"]]) < 0.1 * rounding
    assert difference(latents[again], latents[runs["wide"]]) < TOLERANCE


def test_a_lora_in_bypass_mode(host, lora):
    graph = Graph()
    model = graph.node("LoraLoaderBypassModelOnly", model=graph.usp(), lora_name=lora, strength_model=1.0)
    assert "LoRA in bypass mode" in failure(host, graph, model)
    graph = Graph()
    assert short_run(host, graph, graph.usp(), seed=22).latents
