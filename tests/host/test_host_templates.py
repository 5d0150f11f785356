"""ComfyUI's own templates with "Use FastUSP here" and its reverse, and this pack's blueprint, in a real page."""

import json
import re

import pytest
from browser import PAUSED, PROGRAM
from comfy import REPOSITORY
from conversion import BACK, CHECKPOINT, OURS, PROMPT, TRACKER, UNET, USE, command, graphs, load, nodes, plain, refused
from workflows import DEV, SMALL_FLUX2

from fastusp_backend.models.synthetic import TINY_QWEN_IMAGE, write_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]


def templates(host) -> dict[str, dict]:
    """ComfyUI's templates of FLUX and Qwen-Image that load a model on this machine."""
    folders = host.path.glob("venv/lib/python3*/site-packages/comfyui_workflow_templates*/templates")
    files = [file for folder in folders for file in folder.glob("*.json") if re.search("flux|qwen", file.stem, re.I)]
    texts = {file.stem: file.read_text() for file in sorted(files)}
    return {name: json.loads(text) for name, text in texts.items() if f'"{UNET}"' in text or f'"{CHECKPOINT}"' in text}


def family(name: str) -> str:
    return "qwen" if "qwen" in name.lower() else "flux2" if "flux2" in name else "flux"


def kind(workflow: dict) -> tuple:
    """What a conversion meets: loaders of which types, how many, in boxes or not, with a name that shows on a box."""
    found = []
    for number, graph in enumerate(graphs(workflow)):
        found += [(node["type"], number > 0) for node in graph["nodes"] if node["type"] in (UNET, CHECKPOINT)]
    shown = {entry["name"] for box in graphs(workflow)[1:] for entry in box.get("inputs", ())}
    return tuple(sorted(found)), "unet_name" in shown, "ckpt_name" in shown


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
        for node in nodes(workflow, UNET, CHECKPOINT):
            folder = models / ("checkpoints" if node["type"] == CHECKPOINT else "diffusion_models")
            if "lotus" not in node["widgets_values"][0]:  # depth maps: of no family that FastUSP has
                links.add((folder / node["widgets_values"][0], tiny[family(name)]))
    for link, target in links:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    yield found
    for path in [*(link for link, _target in links), tiny["flux2"], tiny["qwen"]]:
        path.unlink()


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


@pytest.mark.parametrize(
    "which", ["the shortest of each kind and family", pytest.param("all", marks=pytest.mark.thorough)]
)
def test_templates(host, page, wanted, which):
    """All convert, give the same prompt otherwise, are accepted by the host, and come back as they were."""
    assert len(wanted) >= 41, "templates are not found any more"
    if which != "all":
        longest_first = sorted(wanted, key=lambda name: len(json.dumps(wanted[name])), reverse=True)
        shortest = {what: name for name in longest_first for what in (family(name), kind(wanted[name]))}
        assert len(shortest) >= 9
        wanted = {name: wanted[name] for name in shortest.values()}
    wrong = []
    page.evaluate(PAUSED)
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
        if (steps := page.evaluate(f"({TRACKER}.captureCanvasState(), {TRACKER}.undoQueue.length)")) != 2:
            wrong.append(f"{name}: {steps} steps in the history")
    assert not wrong, "\n".join(wrong)


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
