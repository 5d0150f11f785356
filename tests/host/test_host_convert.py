""" "Use FastUSP here" and its reverse, in a real page, over ComfyUI's own templates and what they do not have."""

import json
import re

import pytest
from browser import PROGRAM, Page
from comfy import REPOSITORY, PromptFailed
from workflows import DEV, SMALL_FLUX2

from fastusp_backend.models.synthetic import TINY_QWEN_IMAGE, write_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

OURS, UNET, CHECKPOINT, GGUF = "FastUSPLoader", "UNETLoader", "CheckpointLoaderSimple", "UnetLoaderGGUF"
GRAPH = "app.graph.rootGraph.serialize()"
SETTLED = "new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))"
"""Some nodes settle in the frame after they were loaded."""
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
TOAST = "[...document.querySelectorAll('.p-toast-message')].at(-1)?.innerText"
USE, BACK = "FastUSP.UseHere", "FastUSP.UseComfyUI"


@pytest.fixture(scope="module")
def page(host, tmp_path_factory):
    page = Page(f"http://127.0.0.1:{host.port}/", tmp_path_factory.mktemp("browser"))
    yield page
    page.close()


def load(page: Page, workflow: dict) -> dict:
    """Opens a workflow, in the tab that is open, without a history; what it is once ComfyUI has read it."""
    return page.evaluate(f"""(async () => {{
        await app.loadGraphData({json.dumps(workflow)}, true, false, app.extensionManager.workflow.activeWorkflow);
        await {SETTLED};
        {TRACKER}.captureCanvasState();
        {TRACKER}.undoQueue.length = 0;
        return {GRAPH};
    }})()""")


def command(page: Page, name: str) -> dict:
    return page.evaluate(f"app.extensionManager.command.execute('{name}').then(() => {GRAPH})")


def graphs(workflow: dict) -> list[dict]:
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def nodes(workflow: dict, *types: str) -> list[dict]:
    return [node for graph in graphs(workflow) for node in graph["nodes"] if node["type"] in types]


def plain(workflow):
    """Without the order of execution, which ComfyUI itself changes when it loads what it has saved."""
    if isinstance(workflow, dict):
        return {key: plain(value) for key, value in workflow.items() if key != "order"}
    return [plain(value) for value in workflow] if isinstance(workflow, list) else workflow


def templates(host) -> dict[str, dict]:
    """ComfyUI's templates of FLUX and Qwen-Image that load a model on this machine."""
    folders = host.path.glob("venv/lib/python3*/site-packages/comfyui_workflow_templates*/templates")
    files = [file for folder in folders for file in folder.glob("*.json") if re.search("flux|qwen", file.stem, re.I)]
    texts = {file.stem: file.read_text() for file in sorted(files)}
    return {name: json.loads(text) for name, text in texts.items() if f'"{UNET}"' in text or f'"{CHECKPOINT}"' in text}


@pytest.fixture(scope="module")
def wanted(host):
    """The templates, and a tiny file of the right family for each name that their loaders have."""
    found = templates(host)
    if not found:
        pytest.skip("this ComfyUI has no templates")
    models = host.base / "models"
    (models / "checkpoints").mkdir(exist_ok=True)
    tiny = {family: models / f"diffusion_models/tiny_{family}.safetensors" for family in ("flux2", "qwen")}
    write_checkpoint(str(tiny["flux2"]), SMALL_FLUX2)
    write_checkpoint(str(tiny["qwen"]), TINY_QWEN_IMAGE)
    tiny["flux"], links = models / "diffusion_models" / DEV, set()
    for name, workflow in found.items():
        family = "qwen" if "qwen" in name.lower() else "flux2" if "flux2" in name else "flux"
        for node in nodes(workflow, UNET, CHECKPOINT):
            folder = models / ("checkpoints" if node["type"] == CHECKPOINT else "diffusion_models")
            if "lotus" not in node["widgets_values"][0]:  # depth maps: of no family that FastUSP has
                links.add((folder / node["widgets_values"][0], tiny[family]))
    for link, target in links:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    yield found
    for path in [*(link for link, _target in links), tiny["flux2"], tiny["qwen"]]:
        path.unlink()


PROMPT = "app.graphToPrompt().then(prompt => prompt.output)"


def refused(host, prompt: dict) -> set[str]:
    """The files of USP Loaders that the host does not accept. Nothing runs: the nodes behind them lack an input."""
    loaders = {number: node for number, node in prompt.items() if node["class_type"] == OURS}
    ends = {f"end {number}": {"class_type": "ModelSave", "inputs": {"model": [number, 0]}} for number in loaders}
    with pytest.raises(PromptFailed) as failure:
        host.post("/prompt", {"prompt": loaders | ends})
    errors = json.loads(failure.value.text)["node_errors"]
    assert ends.keys() <= errors.keys()
    return {loaders[number]["inputs"]["unet_name"] for number in errors.keys() & loaders.keys()}


def with_stock(prompt: dict) -> dict:
    """A prompt with the loaders that it had before USP Loader took their places."""
    prompt, moved = dict(prompt), {}
    for number, node in list(prompt.items()):
        if node["class_type"] == OURS:
            inputs = {key: node["inputs"][key] for key in ("unet_name", "weight_dtype")}
            name = inputs["unet_name"].removesuffix(" [checkpoints]")
            within = number.rpartition(":")[0]  # the box
            old = [other for other, node in prompt.items() if node["inputs"].get("ckpt_name") == name]
            old = [other for other in old if other.rpartition(":")[0] == within]
            prompt[number] = node | {"class_type": UNET, "inputs": inputs}
            if name != inputs["unet_name"]:
                moved[number] = old[0]
                del prompt[number]
    for number, node in prompt.items():
        inputs = {key: [moved.get(x[0], x[0]), x[1]] if isinstance(x, list) else x for key, x in node["inputs"].items()}
        prompt[number] = {"class_type": node["class_type"], "inputs": inputs}
    return prompt


def test_templates(host, page, wanted):
    """All convert, give the same prompt otherwise, are accepted by the host, and come back as they were."""
    wrong = []
    page.evaluate("app.canvas.pause_rendering = true")  # by software it takes half of the time
    for name, workflow in wanted.items():
        before = load(page, workflow)
        prompt = page.evaluate(PROMPT)
        after = command(page, USE)
        ours = page.evaluate(PROMPT)
        again = command(page, BACK)
        count = len([node for node in nodes(before, UNET, CHECKPOINT) if node["outputs"][0]["links"]])
        left = [node for node in nodes(after, UNET, CHECKPOINT) if node["outputs"][0]["links"]]
        if not count or count != len(nodes(after, OURS)) or left:
            wrong.append(f"{name}: {count} loaders, {len(left)} left")
        if with_stock(ours) != with_stock(prompt):
            wrong.append(f"{name}: another prompt")
        files = [node["inputs"]["unet_name"] for node in ours.values() if node["class_type"] == OURS]
        if not files or refused(host, ours) != {file for file in files if "lotus" in file}:
            wrong.append(f"{name}: of {files}, {refused(host, ours)} are refused")
        if plain(again) != plain(before):
            wrong.append(f"{name}: does not come back")
    assert not wrong, "\n".join(wrong)


def open_prompt(page: Page, prompt: dict) -> None:
    """As a workflow that was just opened: nodes by number, {"class_type", "inputs"}."""
    page.evaluate(f"app.loadApiJson({json.dumps(prompt)}, 'convert')")


def user(page: Page, script: str) -> dict:
    """What a user does, then the workflow, opened anew as it would be saved. box(ids, name, ...): a subgraph of
    nodes, which shows these widgets, each of all of them as one; answers its box. of(id): a node."""
    page.evaluate(f"""{{
        const of = id => app.graph.getNodeById(id);
        const box = (ids, ...names) => {{
            const {{ subgraph, node }} = app.graph.convertToSubgraph(new Set([ids].flat().map(of)));
            for (const name of names) {{
                const shown = subgraph.addInput(name, "COMBO");
                for (const inner of subgraph.nodes)
                    shown.connect(inner.inputs.find(input => input.name === name), inner);
            }}
            return node;
        }};
        {script};
    }} 0""")
    return load(page, page.evaluate(GRAPH))


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def lora(number: int) -> dict:
    return node("LoraLoaderModelOnly", model=[str(number), 0], lora_name="x", strength_model=1.0)


def unet(name: str = DEV, dtype: str = "default") -> dict:
    return node(UNET, unet_name=name, weight_dtype=dtype)


def widgets(node: dict) -> dict:
    return node["widgets_values_named"]


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


def test_room_for_more_widgets(page):
    """Below, or above where another node would be covered; a node that was moved since is not moved back."""
    open_prompt(page, {"1": unet(), "2": lora(1)})
    before = user(page, "of(1).pos = [0, 0], of(2).pos = [0, 200], of(2).size = [300, 90]")
    (old,), (new,) = nodes(before, UNET), nodes(command(page, USE), OURS)
    assert new["size"][1] > old["size"][1] and new["pos"][1] + new["size"][1] == old["size"][1]
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
    definition = {"name": GGUF, "display_name": GGUF, "category": "", "python_module": "custom_nodes.gguf"}
    definition |= {"input": {"required": {"unet_name": [["q4.gguf"]]}}}
    definition |= {"output": ["MODEL"], "output_name": ["MODEL"], "output_is_list": [False]}
    page.evaluate(f"app.registerNodeDef('{GGUF}', {json.dumps(definition)})")
    open_prompt(page, {"1": node(GGUF, unet_name="q4.gguf"), "2": lora(1)})
    before = user(page, "")
    assert widgets(nodes(command(page, USE), OURS)[0])["unet_name"] == "q4.gguf"
    assert plain(command(page, BACK)) == plain(before)


def test_menus(page):
    open_prompt(page, {"1": unet(), "2": lora(1), "3": unet(), "4": lora(3)})
    user(page, "box(3)")
    items = "app.graph.nodes.flatMap(node => app.collectNodeMenuItems(node)).filter(Boolean)"
    use = f"{items}.filter(item => item.content === 'Use FastUSP here')"
    back = f'{items}.filter(item => item.content.startsWith("Use ComfyUI\'s own"))'
    for converted in (0, 1, 2):
        assert len(nodes(page.evaluate(GRAPH), OURS)) == converted
        assert page.evaluate(f"[{use}.length, {back}.length]") == [2 - converted, converted]
        page.evaluate(f"{use}[0]?.callback()")
    page.evaluate(f"{back}[0].callback()")
    assert len(nodes(page.evaluate(GRAPH), OURS)) == 1


def test_blueprint(host, page):
    """The subgraph in ComfyUI's library; what it shows reaches its nodes."""
    (file,) = (REPOSITORY / "subgraphs").glob("*.json")
    listed = host.get("/global_subgraphs").values()
    assert any(entry["name"] == file.stem and "FastUSP" in entry["info"]["node_pack"] for entry in listed)
    workflow = json.loads(file.read_text())
    (box,) = workflow["nodes"]
    box["widgets_values"] = [DEV if value == "flux1-dev.safetensors" else value for value in box["widgets_values"]]
    load(page, workflow)
    prompt = page.evaluate(PROMPT)
    given = {(name, str(value)) for node in prompt.values() for name, value in node["inputs"].items()}
    shown = [entry["name"] for entry in box["inputs"]]
    assert {*zip(shown, map(str, box["widgets_values"]), strict=True)} <= given
    assert len(prompt) == 9 and not refused(host, prompt)
