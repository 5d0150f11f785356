"""What saved workflows and the page rely on: ids, inputs and outputs of the nodes, the status route, the examples."""

import json
import urllib.error
import urllib.request
from urllib.parse import urljoin

import pytest
from comfy import REPOSITORY
from PIL import Image
from workflows import DEV, SMALL_FLUX2, SMALL_QWEN, SMALL_Z_IMAGE, Graph

pytestmark = pytest.mark.host

FILES = {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "lora_name", "control_net_name", "ckpt_name"}
FILES |= {"image"}
"""Inputs that name what the user has."""
SHIPPED = "fastusp_demo_shapes_api"
"""Runs as it is, in test_host_demo.py."""
EXAMPLES = sorted(p for p in (REPOSITORY / "example_workflows").rglob("*.json") if "api" in p.name)

# id: (display name, [(input, type, default)], outputs); new inputs are appended, as optional ones.
NODES = {
    "FastUSPLoader": (
        "USP Loader",
        [
            ("unet_name", "COMBO", None),
            ("weight_dtype", "COMBO", "default"),
            ("gpus", "STRING", "auto"),
            ("ulysses", "INT", 0),
            ("ring", "INT", 0),
            ("settings", "USP_SETTINGS", None),
        ],
        ["MODEL"],
    ),
    "FastUSPSampler": (
        "USP Sampler",
        [
            ("model", "MODEL", None),
            ("seed", "INT", 0),
            ("steps", "INT", 20),
            ("cfg", "FLOAT", 1.0),
            ("sampler_name", "COMBO", None),
            ("scheduler", "COMBO", None),
            ("positive", "CONDITIONING", None),
            ("negative", "CONDITIONING", None),
            ("latent_image", "LATENT", None),
            ("denoise", "FLOAT", 1.0),
        ],
        ["LATENT"],
    ),
    "FastUSPSettings": (
        "USP Optimization Settings",
        [("wire", "COMBO", "exact"), ("attention", "COMBO", "auto")],
        ["USP_SETTINGS"],
    ),
}


@pytest.mark.any_host
@pytest.mark.parametrize("node", NODES)
def test_schema(host, node):
    name, fixed, outputs = NODES[node]
    info = host.get(f"/object_info/{node}")[node]
    assert (info["display_name"], info["category"], info["output"]) == (name, "FastUSP", outputs)
    inputs = [(key, *of) for group in ("required", "optional") for key, of in info["input"].get(group, {}).items()]
    assert [(key, kind, options.get("default")) for key, kind, options in inputs][: len(fixed)] == fixed
    assert {key for key, *_ in fixed} - {"settings"} == set(info["input"]["required"])
    assert all(options.get("tooltip") for *_, options in inputs)
    assert info["description"]


ADVANCED = {
    "FastUSPLoader": {"ulysses", "ring", "batch_parallel"},
    "FastUSPSampler": set(),
    "FastUSPSettings": {"compile", "cuda_graphs", "overlap", "ring_pipeline", "cache_start", "cache_end"},
}


@pytest.mark.any_host
@pytest.mark.parametrize("node", NODES)
def test_what_is_seldom_set_is_advanced(host, node):
    groups = host.get(f"/object_info/{node}")[node]["input"].values()
    assert {name for group in groups for name, of in group.items() if of[1].get("advanced")} == ADVANCED[node]


@pytest.mark.parametrize("node", NODES)
def test_found_by_what_people_search_for(host, node):
    wanted = {"multi gpu", "multigpu", "parallel"} | ({"gpus", "flux loader"} if node == "FastUSPLoader" else set())
    assert wanted <= set(host.get(f"/object_info/{node}")[node]["search_aliases"])


@pytest.mark.any_host
def test_lists(host):
    def options(node, name):
        kind, *more = host.get(f"/object_info/{node}")[node]["input"]["required"][name]
        return more[0]["options"] if kind == "COMBO" else kind

    for name in ("sampler_name", "scheduler"):
        assert options("FastUSPSampler", name) == options("KSampler", name)
    assert options("FastUSPLoader", "unet_name") == options("UNETLoader", "unet_name")
    assert options("FastUSPLoader", "weight_dtype") == ["default", "bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"]
    assert options("FastUSPSettings", "wire")[0] == "exact"
    assert options("FastUSPSettings", "attention")[0] == "auto"


@pytest.mark.any_host
def test_only_files_that_can_be_read_are_listed(host):
    names = ["a.sft", "b.GGUF", "pickle.pt", "pickle.ckpt", "pickle.bin"]
    files = [host.base / "models" / folder / name for folder in ("diffusion_models", "checkpoints") for name in names]
    files[-1].parent.mkdir(exist_ok=True)
    try:
        for file in files:
            file.touch()
        kind, *more = host.get("/object_info/FastUSPLoader")["FastUSPLoader"]["input"]["required"]["unet_name"]
        offered = more[0]["options"] if kind == "COMBO" else kind
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    assert {"a.sft", "b.GGUF", "a.sft [checkpoints]"} <= set(offered) and not [
        name for name in offered if "pickle" in name
    ]


@pytest.mark.any_host
def test_status_route(host):
    for pool in host.get("/fastusp/status")["pools"]:
        assert {"devices", "ranks", "state", "starts"} <= pool.keys()


@pytest.mark.any_host
@pytest.mark.parametrize(
    ("action", "body", "headers", "code", "said"),
    [
        ("log?devices=cpu:77", None, {}, 404, "There is no pool on cpu:77"),
        ("log?devices=../../etc", None, {}, 404, "There is no pool on"),
        ("log?devices=cpu:2&from=-1", None, {}, 400, "Send from=N"),
        ("log?devices=cpu:2", None, {"Sec-Fetch-Site": "cross-site"}, 403, ""),
        ("report?devices=cpu:2", None, {"Sec-Fetch-Site": "same-site"}, 403, ""),
        ("../status", None, {"Sec-Fetch-Site": "same-site"}, 403, ""),
        ("../gpus", None, {"Sec-Fetch-Site": "same-site"}, 403, ""),
        ("../texts?client=a", None, {"Sec-Fetch-Site": "same-site"}, 403, ""),
        ("../watch", {"client": "a"}, {"Sec-Fetch-Site": "same-site"}, 403, ""),
        ("../watch", {"client": "a"}, {"Content-Type": "text/plain"}, 415, "Send JSON"),
        ("../watch", {"client": 1}, {}, 400, "Send the page's client, panel and log: "),
        ("../watch", {"client": "nobody", "panel": True}, {}, 404, "Connect to /ws first"),
        ("report", None, {}, 404, "There is no pool on"),
        ("explode", {"devices": "cpu:2"}, {}, 404, "Choose one of release, stop, restart, not explode"),
        ("stop", {"devices": "cpu:77"}, {}, 404, "There is no pool on cpu:77"),
        ("stop", ["cpu:2"], {}, 400, 'Send {"devices": ...}'),
        ("stop", {"devices": "cpu:2"}, {"Origin": "http://evil.example"}, 403, ""),
        ("stop", {"devices": "cpu:2"}, {"Sec-Fetch-Site": "cross-site"}, 403, ""),
        ("stop", {"devices": "cpu:2"}, {"Content-Type": "text/plain"}, 415, "Send JSON"),
    ],
)
def test_what_is_done_to_pools_is_named_and_comes_from_this_page(host, action, body, headers, code, said):
    request = urllib.request.Request(
        urljoin(f"http://127.0.0.1:{host.port}/fastusp/pools/", action),
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | headers,
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == code and said in (
        json.loads(error.value.read() or b"{}").get("error", "") if said else ""
    )


@pytest.mark.any_host
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_fits_the_nodes_of_the_host(host, path):
    """Its inputs are the ones that each node has, and its choices are offered, but for files, which are the user's."""
    if path.name.startswith("flux.2") and "EmptyFlux2LatentImage" not in host.get("/object_info"):
        pytest.skip("this ComfyUI does not know FLUX.2")
    for node in json.loads(path.read_text()).values():
        kind, given = node["class_type"], node["inputs"]
        info = host.get(f"/object_info/{kind}")[kind]["input"]
        known = info["required"] | info.get("optional", {})
        assert info["required"].keys() <= given.keys() <= known.keys(), kind
        for name in given.keys() - FILES:
            choices, *more = known[name]
            choices = more[0]["options"] if choices == "COMBO" else choices
            assert not isinstance(choices, list) or given[name] in choices, (kind, name)


@pytest.fixture(scope="module")
def picture(host):
    """A small picture with a mask."""
    image = Image.new("RGBA", (64, 64), (64, 160, 240, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    image.save(host.base / "input/picture.png")
    return "picture.png"


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem != SHIPPED], ids=lambda path: path.stem)
def test_example_runs(host, picture, fill, flux2, chroma, qwen, qwen_lora, qwen_control_net, sd3, z_image, path):
    """As it is, but for what cannot be had in a test: text encoders, VAE and weights, and sizes for CPUs."""
    files = {"flux.1_fill": (fill, 4096), "flux.1": (DEV, 4096), "flux.2": (flux2, SMALL_FLUX2.context)}
    files |= {"chroma": (chroma, 4096), "qwen": (qwen, SMALL_QWEN.context), "stable": (sd3, 4096)}
    files |= {"z-image": (z_image, SMALL_Z_IMAGE.context)}
    file, context = next(files[start] for start in files if path.name.startswith(start))
    small = {"unet_name": file, "gpus": "cpu:2", "width": 64, "height": 64, "steps": 2, "image": picture}
    small |= {"lora_name": qwen_lora, "control_net_name": qwen_control_net}
    graph = Graph(json.loads(path.read_text()))
    for number, node in list(graph.items()):
        kind, inputs = node["class_type"], node["inputs"]
        if kind in ("CLIPTextEncode", "TextEncodeQwenImageEditPlus"):
            prompt = graph.prompt(int(number), width=context, pooled=2048 if file == sd3 else 768)
            if kind != "CLIPTextEncode":
                prompt = graph.referring(prompt, (64, 64), framed=True)
            graph[number] = graph.pop(prompt[0])
        elif kind == "VAELoader":
            graph[number] = {"class_type": "TestVAE", "inputs": {"framed": file == qwen}}
        elif kind == "FluxKontextImageScale":
            size = {"upscale_method": "bilinear", "width": 64, "height": 64, "crop": "disabled"}
            graph[number] = {"class_type": "ImageScale", "inputs": inputs | size}
        elif kind == "VAEDecode":
            graph[number] = {
                "class_type": "SaveLatent",
                "inputs": {"samples": inputs["samples"], "filename_prefix": "x"},
            }
        else:
            inputs |= {name: small[name] for name in small if isinstance(inputs.get(name), str | int)}
    left_out = ("CLIPLoader", "DualCLIPLoader", "CheckpointLoaderSimple", "SaveImage")
    assert host.run({number: node for number, node in graph.items() if node["class_type"] not in left_out}).latents
