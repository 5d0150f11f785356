"""The example workflows hold together: links, widgets, and the ids and inputs that saved workflows depend on."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from fastusp_backend import shapes

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_workflows"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
"""The titles that ComfyUI's list of templates shows."""

# Fixed: links first, then widgets, in the page's order. Inputs added later are optional and come last.
LINKED = {
    "FastUSPLoader": ["settings"],
    "FastUSPSampler": ["model", "positive", "negative", "latent_image"],
    "FastUSPSettings": [],
}
WIDGETS = {
    "FastUSPLoader": ["unet_name", "weight_dtype", "gpus", "ulysses", "ring"],
    "FastUSPSampler": ["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
    "FastUSPSettings": ["wire", "attention"],
}
OUTPUTS = {"FastUSPLoader": "MODEL", "FastUSPSampler": "LATENT", "FastUSPSettings": "USP_SETTINGS"}
SEED_CONTROLS = {"fixed", "increment", "decrement", "randomize"}
PAGE_ALONE = {"control_after_generate", "upload"}
"""Widgets whose values are no inputs."""
NOTE = "MarkdownNote"
SHIPPED = shapes.MODEL.name
"""Comes with the pack: nothing to download."""
MODEL_INPUTS = re.compile(r"unet_name|clip_name\d?|vae_name|lora_name|control_net_name|ckpt_name")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def page(name):
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def api(name):
    return json.loads(api_file(name).read_text(encoding="utf-8"))


def api_file(name: str) -> Path:
    return EXAMPLES / "api" / f"{name.lower().replace(' ', '_')}_api.json"


def widget_values(node: dict) -> dict:
    """A page node's values by widget name; fails where their number does not fit the widgets."""
    names = [x["name"] for x in node["inputs"] if "widget" in x]
    if "seed" in names:
        names.insert(names.index("seed") + 1, "control_after_generate")
    if node["type"] == NOTE:
        names = ["text"]
    assert len(node["widgets_values"]) == len(names), node["type"]
    return dict(zip(names, node["widgets_values"], strict=True))


def test_templates_have_a_picture_and_only_the_page_form_is_one():
    """ComfyUI lists every JSON file directly in the folder as a template; one in API form would open empty."""
    assert len(NAMES) >= 11
    assert sorted(EXAMPLES.glob("api/*.json")) == sorted(map(api_file, NAMES))
    assert sorted(path.stem for path in EXAMPLES.glob("*.jpg")) == NAMES
    for name in NAMES:
        with Image.open(EXAMPLES / f"{name}.jpg") as picture:
            assert picture.format == "JPEG" and picture.width == picture.height >= 400, "cards are square"
        assert (EXAMPLES / f"{name}.jpg").stat().st_size < 60_000


def origins(nodes: list[dict]) -> None:
    """ComfyUI's page names the packs, and the versions, of nodes that are missing."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    name, version = re.search(r'^name = "(.+)"\nversion = "(.+)"', project, re.MULTILINE).groups()
    for node in nodes:
        properties = node["properties"]
        if node["type"].startswith("FastUSP"):
            assert (properties["cnr_id"], properties["ver"]) == (name, version)
        elif node["type"] != NOTE:
            assert properties["cnr_id"] == "comfy-core" and re.fullmatch(r"\d+\.\d+\.\d+", properties["ver"])


def test_every_node_is_told_where_it_comes_from(page):
    origins(page["nodes"])


def test_the_blueprint_too_with_its_files():
    (file,) = (ROOT / "subgraphs").glob("*.json")
    (graph,) = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    origins(graph["nodes"])
    named = [model["name"] for node in graph["nodes"] for model in node["properties"].get("models", ())]
    values = [str(value) for node in graph["nodes"] for value in node.get("widgets_values") or ()]
    assert named == [value for value in values if value.endswith(".safetensors")]


def test_every_file_can_be_downloaded(page):
    """ComfyUI's page offers what a loader's `models` name and the machine lacks; the note has the same links."""
    (note,) = [node["widgets_values"][0] for node in page["nodes"] if node["type"] == NOTE]
    for node in page["nodes"]:
        named = [str(value) for name, value in widget_values(node).items() if MODEL_INPUTS.fullmatch(name)]
        models = node["properties"].get("models", [])
        named = [file for file in named if file != SHIPPED]
        assert [model["name"] for model in models] == [file.removesuffix(" [checkpoints]") for file in named]
        for file, model in zip(named, models, strict=True):
            assert model["url"].startswith("https://huggingface.co/") and "/resolve/main/" in model["url"]
            assert model["url"].endswith(f"/{model['name']}") and model["url"] in note
            assert model["directory"] in (
                "checkpoints",
                "controlnet",
                "diffusion_models",
                "loras",
                "text_encoders",
                "vae",
            )
            assert (model["directory"] == "checkpoints") == (file.endswith("[checkpoints]") or "ckpt_name" in str(node))


def test_the_demo_needs_no_file_that_is_not_shipped():
    page = json.loads((EXAMPLES / "FastUSP demo shapes.json").read_text(encoding="utf-8"))
    named = [value for node in page["nodes"] if node["type"] == "FastUSPLoader" for value in node["widgets_values"]]
    assert SHIPPED in named and shapes.MODEL.is_file()
    assert not [node for node in page["nodes"] if "huggingface" in str(node)]
    prompts = [node["widgets_values"][0] for node in page["nodes"] if node["type"] == "FastUSPDemoPrompt"]
    assert all(shapes.Caption.read(prompt) for prompt in prompts) and prompts


def test_titles_say_what_a_node_is_for(page):
    assert all(node["title"] not in ("", node["type"]) for node in page["nodes"])


def test_page_links(page):
    nodes = {x["id"]: x for x in page["nodes"]}
    assert len(nodes) == len(page["nodes"]) and max(nodes) == page["last_node_id"]
    links = {x[0]: x for x in page["links"]}
    assert len(links) == len(page["links"]) and max(links) == page["last_link_id"]
    for number, source, source_slot, target, target_slot, kind in page["links"]:
        output, into = nodes[source]["outputs"][source_slot], nodes[target]["inputs"][target_slot]
        assert number in output["links"] and into["link"] == number
        assert output["type"] == into["type"] == kind
    used = [x["link"] for node in nodes.values() for x in node["inputs"] if x["link"] is not None]
    given = [link for node in nodes.values() for x in node["outputs"] for link in x["links"] or ()]
    assert sorted(used) == sorted(given) == sorted(links)


def is_demo(nodes) -> bool:
    """Whether they are the example of the shipped model, which is small enough to do without USP Optimization
    Settings."""
    return SHIPPED in str([*nodes])


def test_page_leaves_no_input_unconnected(page):
    for node in page["nodes"]:
        spare = "image[23]|settings" if is_demo(page["nodes"]) else "image[23]"
        needed = [x for x in node["inputs"] if "widget" not in x and not re.fullmatch(spare, x["name"])]
        assert all(x["link"] is not None for x in needed), node["type"]


def test_page_widgets(page):
    for node in page["nodes"]:
        values = widget_values(node)
        assert values.get("control_after_generate", "fixed") in SEED_CONTROLS


@pytest.mark.parametrize("kind", LINKED)
def test_page_inputs_of_our_nodes(page, kind):
    if kind == "FastUSPSettings" and is_demo(page["nodes"]):
        return
    (node,) = [x for x in page["nodes"] if x["type"] == kind]
    assert [x["name"] for x in node["inputs"] if "widget" not in x] == LINKED[kind]
    assert [x["name"] for x in node["inputs"] if "widget" in x] == WIDGETS[kind]
    assert [x["type"] for x in node["outputs"]] == [OUTPUTS[kind]]


@pytest.mark.parametrize("kind", LINKED)
def test_api_inputs_of_our_nodes(api, kind):
    linked = LINKED[kind]
    if is_demo(api.values()):
        if kind == "FastUSPSettings":
            return
        linked = [name for name in linked if name != "settings"]
    (node,) = [x for x in api.values() if x["class_type"] == kind]
    assert sorted(node["inputs"]) == sorted(linked + WIDGETS[kind])


def test_api_is_the_page_as_a_prompt(page, api):
    """Same nodes, values and links; links in the API form are [node, slot]."""
    links = {number: [str(source), slot] for number, source, slot, *_ in page["links"]}
    expected = {}
    for node in page["nodes"]:
        if node["type"] == NOTE:
            continue
        inputs = {k: v for k, v in widget_values(node).items() if k not in PAGE_ALONE}
        inputs |= {x["name"]: links[x["link"]] for x in node["inputs"] if x["link"] is not None}
        expected[str(node["id"])] = (node["type"], inputs)
    assert {k: (v["class_type"], v["inputs"]) for k, v in api.items()} == expected


def test_api_links_lead_to_nodes(api):
    for node in api.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in api
