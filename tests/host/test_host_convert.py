""" "Use FastUSP here" and its reverse, in a real page, over ComfyUI's own templates and what they do not have."""

import json
import re

import pytest
from browser import PROGRAM, Page
from comfy import PromptFailed
from workflows import DEV, SMALL_FLUX2

from fastusp_backend.models.synthetic import TINY_QWEN_IMAGE, write_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

OURS, UNET, CHECKPOINT, GGUF = "FastUSPLoader", "UNETLoader", "CheckpointLoaderSimple", "UnetLoaderGGUF"
GRAPH = """new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))
    .then(() => app.graph.rootGraph.serialize())"""  # some nodes settle in the frame after
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
TOAST = "[...document.querySelectorAll('.p-toast-message')].at(-1)?.innerText"
USE, BACK = "FastUSP.UseHere", "FastUSP.UseComfyUI"


@pytest.fixture(scope="module")
def page(host, tmp_path_factory):
    page = Page(f"http://127.0.0.1:{host.port}/", tmp_path_factory.mktemp("browser"))
    yield page
    page.close()


def load(page: Page, workflow: dict, name: str = "convert") -> dict:
    """Opens a workflow; what it is once ComfyUI has read it."""
    page.evaluate(f"app.loadGraphData({json.dumps(workflow)}, true, true, {json.dumps(name)})")
    return page.evaluate(GRAPH)


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
    """The files of those USP Loaders that the host does not accept. Nothing runs: the nodes behind them lack an input."""
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
        before = load(page, workflow, name)
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
