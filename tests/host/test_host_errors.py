"""What cannot be done is refused in words that name it: by validation where it can be known, else by the node."""

import json

import loras
import pytest
import torch
from comfy import PromptFailed
from safetensors.torch import load_file, save_file
from workflows import DEV, SMALL, Graph

pytestmark = pytest.mark.host


def short_run(host, graph: Graph, model, **inputs):
    graph.save(graph.sample(model, **({"steps": 2} | inputs)))
    return host.run(graph)


def failure(host, graph: Graph, model, **inputs) -> str:
    with pytest.raises(PromptFailed) as error:
        short_run(host, graph, model, **inputs)
    return error.value.text


def refusal(host, *args, **inputs) -> str:
    """What validation says, once; nothing has run then."""
    graph = Graph()
    answer = json.loads(failure(host, graph, graph.usp(*args, **inputs)))
    assert answer["error"]["type"] == "prompt_outputs_failed_validation"
    ((number, node),) = answer["node_errors"].items()
    (error,) = node["errors"]
    assert graph[number]["class_type"] == "FastUSPLoader"
    assert error["extra_info"]["exception_type"] in (
        "FastUSP.CheckpointError",
        "FastUSP.DeviceError",
        "FastUSP.LayoutError",
    )
    return error["details"]


@pytest.mark.any_host
@pytest.mark.parametrize(
    ("gpus", "ulysses", "ring", "words"),
    [
        ("7", 0, 0, ["'7'", "GPU 7 does not exist", "cpu:N"]),
        ("foo", 0, 0, ["'foo' is not understood", "'auto'", "'cpu:N'"]),
        ("cpu:4", 2, 1, ["ulysses x ring = 2 is not the number of ranks, 4", "Set 0, or a legal layout"]),
        ("cpu:2", -1, 0, ["ulysses = -1", "at least 1, or 0"]),
        ("cpu:17", 0, 0, ["'cpu:17'", "Set 1 to 16 CPU ranks"]),
        ("cpu:5", 5, 1, ["Ulysses degree of 5", "attention heads", "a legal layout (ulysses 1 x ring 5)"]),
    ],
)
def test_impossible_combinations(host, gpus, ulysses, ring, words):
    text = refusal(host, gpus, ulysses, ring)
    assert all(word in text for word in words), text


@pytest.mark.any_host
def test_a_choice_that_is_not_offered(host):
    assert "Set batch_parallel to one of auto, on, off, not 'sometimes'" in refusal(host, batch_parallel="sometimes")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated", ["Download", "again. It is truncated"]),
        ("pointer", ["Run git lfs pull", "is a git-lfs pointer"]),
        (
            "radiance",
            [
                "holds Chroma Radiance",
                "FLUX.2 dev and klein, Chroma1-HD, Base and Flash, FLUX.1 dev, schnell",
                "Use Load Diffusion",
            ],
        ),
        ("lora", ["holds a LoRA", "LoraLoaderModelOnly"]),
        ("mxfp4", ["is quantised as mxfp4", "int8 and GGUF"]),
        ("incomplete", ["incomplete", "final_layer.linear.weight"]),
    ],
)
def test_files_of_other_models(host, name, words):
    models = host.base / "models/diffusion_models"
    file = models / f"{name}.safetensors"
    state = load_file(models / DEV)
    if name == "truncated":
        file.write_bytes((models / DEV).read_bytes()[:-1000])
    elif name == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        if name == "radiance":
            state["nerf_blocks.0.norm.scale"] = torch.zeros(4)
        elif name == "lora":
            state = {"transformer.single_blocks.0.linear1.lora_A.weight": torch.zeros(4, 4)}
        elif name == "mxfp4":
            state["img_in.comfy_quant"] = torch.tensor(list(b'{"format": "mxfp4"}'), dtype=torch.uint8)
        else:
            del state["final_layer.linear.weight"]
        save_file(state, file)
    try:
        text = refusal(host, file=file.name)
    finally:
        file.unlink()
    assert all(word in text for word in ("unet_name: ", f"'{file.name}'", *words)), text


def test_linked_inputs_are_checked_when_the_loader_runs(host):
    graph = Graph()
    text = failure(host, graph, graph.usp(graph.node("PrimitiveString", value="foo")))
    assert "'foo' is not understood" in text


@pytest.mark.parametrize(
    ("layer", "had", "wide"),
    [("txt_in", 4096, 4100), ("img_in", 64, 100), ("img_in", 64, 32)],
)
def test_a_lora_that_widens_what_the_workers_do_not(host, layer, had, wide):
    parts = {
        "lora_up.weight": torch.zeros(SMALL.hidden, 2),
        "lora_down.weight": torch.zeros(2, wide),
        "reshape_weight": torch.tensor([SMALL.hidden, wide]),
    }
    tensors = {f"diffusion_model.{layer}.{part}": t for part, t in parts.items()}
    name = loras.write(host.base / "models/loras", f"{layer}_{wide}", tensors)
    graph = Graph()
    model = graph.node("LoraLoaderModelOnly", model=graph.usp(), lora_name=name, strength_model=1.0)
    turns = f"turns diffusion_model.{layer}.weight from ({SMALL.hidden}, {had}) into ({SMALL.hidden}, {wide})"
    assert turns in failure(host, graph, model)


@pytest.mark.parametrize(
    ("rank", "alpha", "odd"),
    [(0, 1.0, {}), (2, float("nan"), {}), (2, 1.0, {"dora_scale": torch.ones(())}), (2, 1.0, {"lora_mid.weight": 5})],
    ids=["rank 0", "alpha", "no dimensions", "five dimensions"],
)
def test_a_lora_that_means_nothing(host, rank, alpha, odd):
    """It is left out with a warning, as ComfyUI leaves out what it cannot compute; nothing dies of it."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    parts = {"lora_up.weight": torch.ones(3 * SMALL.hidden, rank), "lora_down.weight": torch.ones(rank, SMALL.hidden)}
    parts |= {"alpha": torch.tensor(alpha)} | {part: torch.ones([2] * n) if n == 5 else n for part, n in odd.items()}
    file = loras.write(
        host.base / "models/loras", f"odd {rank} {alpha} {[*odd]}", {f"{name}.{part}": t for part, t in parts.items()}
    )
    graph = Graph()
    with_it = graph.node("LoraLoaderModelOnly", model=graph.usp(), lora_name=file, strength_model=1.0)
    plain, odd = (graph.save(graph.sample(model, steps=2)) for model in (graph.usp(), with_it))
    before = len(host.log_text())
    latents = host.run(graph).latents
    assert torch.equal(latents[plain], latents[odd])
    assert "FastUSP leaves a weight patch out: diffusion_model.double_blocks.0.img_attn.qkv" in host.log_text()[before:]


@pytest.mark.parametrize("shape", [torch.tensor(5), torch.tensor([256.0, 100.0]), torch.tensor([256, -1])], ids=str)
def test_a_lora_that_widens_to_no_shape(host, shape):
    parts = {"lora_up.weight": torch.zeros(256, 2), "lora_down.weight": torch.zeros(2, 100), "reshape_weight": shape}
    tensors = {f"diffusion_model.img_in.{part}": t for part, t in parts.items()}
    name = loras.write(host.base / "models/loras", f"shapeless {shape.tolist()}", tensors)
    graph = Graph()
    model = graph.node("LoraLoaderModelOnly", model=graph.usp(), lora_name=name, strength_model=1.0)
    assert f"a LoRA whose reshape_weight {shape.tolist()} is not a shape" in failure(host, graph, model)


def test_lora_hook(host, lora):
    graph = Graph()
    hooks = graph.node("CreateHookLoraModelOnly", lora_name=lora, strength_model=1.0)
    positive = graph.node(
        "ConditioningSetProperties", cond_NEW=graph.prompt(), strength=1.0, set_cond_area="default", hooks=hooks
    )
    with pytest.raises(PromptFailed, match="LoraLoaderModelOnly, for the whole run") as error:
        short_run(host, graph, graph.usp(), positive=positive)
    assert error.value.outcome.texts[-1][1].startswith("FastUSP: failed: Load the LoRA with LoraLoaderModelOnly")
    assert "USP Loader does not support a weight hook (Create Hook LoRA)" in error.value.text


def test_an_attention_mask(host):
    graph = Graph()
    positive = graph.node("TestMaskedConditioning", conditioning=graph.prompt())
    text = failure(host, graph, graph.usp(), positive=positive)
    assert "attention mask" in text and "Set strength_type to multiply in Apply Style Model" in text, text


def test_references_at_timestep_zero(host):
    graph = Graph()
    positive = graph.referring(graph.prompt(), (64, 64), method="index_timestep_zero")
    assert "FLUX.1 knows no reference method index_timestep_zero" in failure(
        host, graph, graph.usp(), positive=positive
    )


def test_a_control_net_of_another_width(host):
    graph = Graph()
    positive = graph.node("TestAppliedControl", conditioning=graph.prompt(), hidden=512, blocks=0)
    assert "choose a ControlNet that was made for this model" in failure(host, graph, graph.usp(), positive=positive)


LAYERS = {"double_layers": "0", "single_layers": "", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
NO_ROPE = {f"{what}_{axis}": value for axis in "xyt" for what, value in (("scale", 2.0), ("shift", 0.0))}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("SkipLayerGuidanceDiT", {**LAYERS, "rescaling_scale": 0.0}, ["patch inside the transformer", "dit"]),
        ("NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}, ["patch inside", "attn1_output_patch"]),
        ("ScaleROPE", NO_ROPE, ["ScaleROPE"]),
        ("FluxKVCache", {}, ["change inside the transformer", "default_ref_method"]),
    ],
)
def test_patches_inside_the_transformer(host, kind, options, words):
    graph = Graph()
    text = failure(host, graph, graph.node(kind, model=graph.usp(), **options))
    assert all(word in text for word in words), text


def test_reading_the_weights(host):
    graph = Graph()
    merged = graph.node("ModelMergeSimple", model1=graph.stock(), model2=graph.usp(), ratio=0.5)
    text = failure(host, graph, merged)
    assert "model merging" in text and "save the result with ModelSave" in text
    graph = Graph()
    graph.node("ModelSave", model=graph.usp(), filename_prefix="saved")
    with pytest.raises(PromptFailed, match="saving"):
        host.run(graph)
    assert not list((host.base / "output").rglob("saved*.safetensors"))


def test_an_attention_that_the_ranks_do_not_have(host):
    graph = Graph()
    settings = graph.node("FastUSPSettings", wire="exact", attention="cudnn")
    text = failure(host, graph, graph.usp(settings=settings))
    assert "'cudnn' does not exist for float32 on cpu ranks" in text and "flash" in text
    pids = host.pool("cpu:2")["pids"]
    graph = Graph()
    assert short_run(host, graph, graph.usp(), seed=21).latents
    assert host.pool("cpu:2")["pids"] == pids


def test_prompts_of_another_model(host):
    graph = Graph()
    positive = graph.node("TestSeededConditioning", seed=1, tokens=7, width=2048, guidance=3.5)
    text = failure(host, graph, graph.usp(), positive=positive)
    assert "(1, 7, 2048)" in text and "choose the text encoders of FLUX.1, those of DualCLIPLoader, type flux" in text
