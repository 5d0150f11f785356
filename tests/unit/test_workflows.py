"""The example workflows hold together: links, widgets, and the ids and inputs that saved workflows depend on."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
NAMES = ["chroma_usp", "flux2_usp", "flux_usp", "qwen_image_usp", "sd3_usp", "z_image_usp"]

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


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def page(name):
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def api(name):
    return json.loads((EXAMPLES / "api" / f"{name}_api.json").read_text(encoding="utf-8"))


def widget_values(node: dict) -> dict:
    """A page node's values by widget name; fails where their number does not fit the widgets."""
    names = [x["name"] for x in node["inputs"] if "widget" in x]
    if "seed" in names:
        names.insert(names.index("seed") + 1, "control_after_generate")
    if node["type"] == "Note":
        names = ["text"]
    assert len(node["widgets_values"]) == len(names), node["type"]
    return dict(zip(names, node["widgets_values"], strict=True))


def test_templates_have_a_picture_and_only_the_page_form_is_one():
    """ComfyUI lists every JSON file directly in the folder as a template; one in API form would open empty."""
    assert sorted(x.name for x in EXAMPLES.glob("*.json")) == [f"{name}.json" for name in NAMES]
    assert sorted(x.name for x in EXAMPLES.glob("api/*.json")) == [f"{name}_api.json" for name in NAMES]
    for name in NAMES:
        picture = (EXAMPLES / f"{name}.jpg").read_bytes()
        assert picture.startswith(b"\xff\xd8\xff") and len(picture) < 200_000


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


def test_page_leaves_no_input_unconnected(page):
    for node in page["nodes"]:
        assert all(x["link"] is not None for x in node["inputs"] if "widget" not in x), node["type"]


def test_page_widgets(page):
    for node in page["nodes"]:
        values = widget_values(node)
        assert values.get("control_after_generate", "fixed") in SEED_CONTROLS


@pytest.mark.parametrize("kind", LINKED)
def test_page_inputs_of_our_nodes(page, kind):
    (node,) = [x for x in page["nodes"] if x["type"] == kind]
    assert [x["name"] for x in node["inputs"] if "widget" not in x] == LINKED[kind]
    assert [x["name"] for x in node["inputs"] if "widget" in x] == WIDGETS[kind]
    assert [x["type"] for x in node["outputs"]] == [OUTPUTS[kind]]


@pytest.mark.parametrize("kind", LINKED)
def test_api_inputs_of_our_nodes(api, kind):
    (node,) = [x for x in api.values() if x["class_type"] == kind]
    assert sorted(node["inputs"]) == sorted(LINKED[kind] + WIDGETS[kind])


def test_api_is_the_page_as_a_prompt(page, api):
    """Same nodes, values and links; links in the API form are [node, slot]."""
    links = {number: [str(source), slot] for number, source, slot, *_ in page["links"]}
    expected = {}
    for node in page["nodes"]:
        if node["type"] == "Note":
            continue
        inputs = {k: v for k, v in widget_values(node).items() if k != "control_after_generate"}
        inputs |= {x["name"]: links[x["link"]] for x in node["inputs"] if x["link"] is not None}
        expected[str(node["id"])] = (node["type"], inputs)
    assert {k: (v["class_type"], v["inputs"]) for k, v in api.items()} == expected


def test_api_links_lead_to_nodes(api):
    for node in api.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in api
