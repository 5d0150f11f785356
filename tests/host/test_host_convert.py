"""What "Use FastUSP here" and its reverse do with workflows as users have them, in a real page."""

import json

import pytest
from browser import PROGRAM
from conversion import (
    BACK,
    CHECKPOINT,
    GGUF,
    GRAPH,
    OURS,
    PROMPT,
    TOAST,
    TRACKER,
    UNET,
    USE,
    command,
    graphs,
    lora,
    node,
    nodes,
    open_prompt,
    plain,
    unet,
    user,
    widgets,
)
from test_host_examples import DRAWN, OVERLAPS
from workflows import DEV

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

WHOLE = {  # a checkpoint of which all is used
    "1": node(CHECKPOINT, ckpt_name="whole.safetensors"),
    "2": node("CLIPTextEncode", clip=["1", 1], text=""),
    "3": node("KSampler", model=["1", 0], positive=["2", 0], negative=["2", 0]),
    "4": node("VAEDecode", samples=["3", 0], vae=["1", 2]),
}


def test_what_the_user_had_stays(page):
    fast = "fp8_e4m3fn_fast"
    open_prompt(page, {"1": unet("a.safetensors", fast), "2": lora(1), "3": lora(1)})
    before = user(page, "Object.assign(of(1), {title: 'Mine', color: '#233', bgcolor: '#355', mode: 4, pos: [7, 9]})")
    after = command(page, USE)
    (old,), (new,) = nodes(before, UNET), nodes(after, OURS)
    kept = ("id", "title", "color", "bgcolor", "mode", "pos")
    assert [new[key] for key in kept] == [old[key] for key in kept] and new["title"] == "Mine"
    assert new["outputs"][0]["links"] == old["outputs"][0]["links"] and after["links"] == before["links"]
    assert (widgets(new)["unet_name"], widgets(new)["weight_dtype"]) == ("a.safetensors", "fp8_e4m3fn")
    assert "Mine" in page.evaluate(TOAST) and "linear = fp8" in page.evaluate(TOAST)
    assert plain(command(page, BACK)) == plain(before)


@pytest.fixture
def advanced_shown(page):
    """Where people have ComfyUI always show advanced inputs, Nodes 2.0 draws USP Loader higher than its size says."""
    always = "app.extensionManager.setting.set('Comfy.Node.AlwaysShowAdvancedWidgets', {})".format
    page.evaluate(always("true"))
    yield
    page.evaluate(always("false"))


def test_room_for_more_widgets(page, renderer, advanced_shown):
    """Below, or above where another node would be covered; a node that was moved since is not moved back."""
    open_prompt(page, {"1": unet(), "2": lora(1)})
    before = user(page, "of(1).pos = [0, 0], of(2).pos = [0, 130], of(2).size = [300, 90]")
    (old,), (new,) = nodes(before, UNET), nodes(command(page, USE), OURS)
    assert new["size"][1] > old["size"][1] and new["pos"][1] + new["size"][1] == old["size"][1]
    page.wait_for(f"{DRAWN} == {2 * renderer} && {OVERLAPS}.length == 0", 5)
    page.evaluate(f"app.graph.getNodeById({new['id']}).pos[0] = 5, 0")
    assert nodes(command(page, BACK), UNET)[0] == old | {"pos": [5, 0]}
    user(page, "of(1).pos = [0, 0], of(2).pos = [0, 800]")
    assert nodes(command(page, USE), OURS)[0]["pos"] == [0, 0]


def test_one_step_each(page):
    """Whatever captures the workflow's state meanwhile, as each click does."""
    open_prompt(page, WHOLE)
    before = user(page, "")
    after = command(page, USE)
    steps = f"({TRACKER}.captureCanvasState(), {TRACKER}.undoQueue.length)"
    assert page.evaluate(steps) == 1
    assert plain(page.evaluate(f"{TRACKER}.undo().then(() => {GRAPH})")) == plain(before)
    assert plain(page.evaluate(f"{TRACKER}.redo().then(() => {GRAPH})")) == plain(after)
    assert plain(command(page, BACK)) == plain(before)
    assert page.evaluate(steps) == 2
    assert command(page, BACK) and "nothing was changed" in page.evaluate(TOAST)


def test_a_checkpoint_of_which_all_is_used(page):
    open_prompt(page, WHOLE)
    before = user(page, "")
    after = command(page, USE)
    (old,), (new,) = nodes(after, CHECKPOINT), nodes(after, OURS)
    assert widgets(new)["unet_name"] == "whole.safetensors [checkpoints]"
    assert new["outputs"][0]["links"] == nodes(before, CHECKPOINT)[0]["outputs"][0]["links"]
    assert [bool(output["links"]) for output in old["outputs"]] == [False, True, True]
    page.evaluate(f"app.graph.getNodeById({new['id']}).widgets[0].value = 'other.safetensors [checkpoints]'")
    apart = nodes(command(page, BACK), CHECKPOINT)
    assert [widgets(node)["ckpt_name"] for node in apart] == ["whole.safetensors", "other.safetensors"]


def test_a_checkpoint_of_which_the_model_is_used(page):
    open_prompt(page, {"1": node(CHECKPOINT, ckpt_name="whole.safetensors"), "2": lora(1)})
    before = user(page, "box(1, 'ckpt_name')")
    after = command(page, USE)
    assert not nodes(after, CHECKPOINT) and len(nodes(after, OURS)) == 1
    prompt = page.evaluate(PROMPT)
    names = [node["inputs"]["unet_name"] for node in prompt.values() if node["class_type"] == OURS]
    assert names == ["whole.safetensors [checkpoints]"]
    assert plain(command(page, BACK)) == plain(before)


def test_widgets_that_subgraphs_show(page):
    """At two levels: the file of a checkpoint of which all is used gets a widget of its own beside the other."""
    open_prompt(page, WHOLE)
    before = user(page, "box(box(1, 'ckpt_name').id, 'ckpt_name')")
    after = command(page, USE)
    (outer,) = [node for node in after["nodes"] if node["type"] in [x["id"] for x in graphs(after)[1:]]]
    assert outer["widgets_values"] == ["whole.safetensors", "whole.safetensors [checkpoints]"]
    loaders = [node for node in page.evaluate(PROMPT).values() if node["class_type"] in (CHECKPOINT, OURS)]
    assert {name for node in loaders for key, name in node["inputs"].items() if key.endswith("_name")} == {
        *outer["widgets_values"]
    }
    assert plain(command(page, BACK)) == plain(before)


def test_a_type_that_a_subgraph_shows(page):
    open_prompt(page, {"1": unet(), "2": lora(1)})
    before = user(page, "box(1, 'weight_dtype', 'unet_name').widgets[0].value = 'fp8_e4m3fn_fast'")
    after = command(page, USE)
    (box,) = [node for node in after["nodes"] if "fastusp" in node["properties"]]
    assert box["widgets_values"] == ["fp8_e4m3fn", DEV]
    assert plain(command(page, BACK)) == plain(before)


def test_widgets_that_are_shown_as_one(page):
    """Two checkpoints' loaders stay for the name that they share; the type that two share is restored once."""
    kinds = {
        CHECKPOINT: {"ckpt_name": "whole.safetensors"},
        UNET: {"unet_name": DEV, "weight_dtype": "fp8_e4m3fn_fast"},
    }
    for (kind, inputs), name in zip(kinds.items(), ("ckpt_name", "weight_dtype"), strict=True):
        open_prompt(page, {"1": node(kind, **inputs), "2": lora(1), "3": node(kind, **inputs), "4": lora(3)})
        before = user(page, f"box([1, 3], '{name}')")
        after = command(page, USE)
        assert len(nodes(after, OURS)) == 2 and len(nodes(after, CHECKPOINT)) == 2 * (kind == CHECKPOINT)
        files = [x["inputs"]["unet_name"] for x in page.evaluate(PROMPT).values() if x["class_type"] == OURS]
        assert files == [DEV if kind == UNET else "whole.safetensors [checkpoints]"] * 2
        assert plain(command(page, BACK)) == plain(before)


def test_what_is_left(page):
    """Loaders that go nowhere, files that USP Loader does not read, checkpoints whose name comes from elsewhere."""
    loaders = {"1": unet(), "2": node(CHECKPOINT, ckpt_name="old.ckpt"), "3": lora(2)}
    open_prompt(page, loaders | {"4": node(CHECKPOINT, ckpt_name="x.safetensors"), "5": lora(4)})
    primitive = "const primitive = LiteGraph.createNode('PrimitiveNode'); app.graph.add(primitive);"
    before = user(page, f"{primitive} primitive.connect(0, of(4), 0)")
    assert command(page, USE) == before
    said = page.evaluate(TOAST)
    assert all(words in said for words in ("nothing was changed", "not old.ckpt", "comes from another node"))


def test_usp_loaders_from_the_start(page):
    names = {"1": DEV, "2": "whole.safetensors [checkpoints]", "3": "q4.gguf"}
    loaders = {number: node(OURS, unet_name=name, weight_dtype="bf16", gpus="cpu:2") for number, name in names.items()}
    open_prompt(page, loaders | {str(number + 10): lora(number) for number in (1, 2, 3)})
    before = user(page, "")
    after = command(page, BACK)
    assert {node["type"] for node in after["nodes"]} == {UNET, CHECKPOINT, OURS, "LoraLoaderModelOnly"}
    assert after["links"] == before["links"] and widgets(nodes(after, UNET)[0])["weight_dtype"] == "default"
    assert f"{GGUF} is not installed" in page.evaluate(TOAST)


def test_gguf(page):
    """With ComfyUI-GGUF's node, or one of its name."""
    for kind in (GGUF, f"{GGUF}Advanced"):
        definition = {"name": kind, "display_name": kind, "category": "", "python_module": "custom_nodes.gguf"}
        definition |= {"input": {"required": {"unet_name": [["q4.gguf"]]}}}
        definition |= {"output": ["MODEL"], "output_name": ["MODEL"], "output_is_list": [False]}
        page.evaluate(f"app.registerNodeDef('{kind}', {json.dumps(definition)})")
    open_prompt(page, {"1": node(GGUF, unet_name="q4.gguf"), "2": lora(1)})
    before = user(page, "")
    assert widgets(nodes(command(page, USE), OURS)[0])["unet_name"] == "q4.gguf"
    assert plain(command(page, BACK)) == plain(before)
    open_prompt(page, {"1": node(f"{GGUF}Advanced", unet_name="q4.gguf"), "2": lora(1)})
    before = user(page, "")
    assert command(page, USE) == before
    assert "put Unet Loader (GGUF) in its place" in page.evaluate(TOAST)


def test_menus(page, renderer):
    open_prompt(page, {"1": unet(), "2": lora(1), "3": unet(), "4": lora(3)})
    user(page, "box(3)")
    items = "app.graph.nodes.flatMap(node => app.collectNodeMenuItems(node)).filter(Boolean)"
    use = f"{items}.filter(item => item.content === 'Use FastUSP here')"
    back = f"{items}.filter(item => item.content.startsWith('Use the ComfyUI loader'))"
    for converted in (0, 1, 2):
        assert len(nodes(page.evaluate(GRAPH), OURS)) == converted
        assert page.evaluate(f"[{use}.length, {back}.length]") == [2 - converted, converted]
        page.evaluate(f"{use}[0]?.callback()")
    page.evaluate(f"{back}[0].callback()")
    assert len(nodes(page.evaluate(GRAPH), OURS)) == 1
