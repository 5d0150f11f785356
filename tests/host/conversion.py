"""Workflows in ComfyUI's page: opened, changed as a user does, converted by commands, compared."""

import json

import pytest
from browser import Page
from comfy import ComfyUI, PromptFailed
from workflows import DEV

OURS, UNET, CHECKPOINT, GGUF = "FastUSPLoader", "UNETLoader", "CheckpointLoaderSimple", "UnetLoaderGGUF"
GRAPH = "app.graph.rootGraph.serialize()"
SETTLED = "new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))"
"""Some nodes settle in the frame after they were loaded."""
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
TOAST = "[...document.querySelectorAll('.p-toast-message')].at(-1)?.innerText"
USE, BACK = "FastUSP.UseHere", "FastUSP.UseComfyUI"
PROMPT = "app.graphToPrompt().then(prompt => prompt.output)"


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


def refused(host: ComfyUI, prompt: dict) -> set[str]:
    """The files of USP Loaders that the host does not accept. Nothing runs: the nodes behind them lack an input."""
    loaders = {number: node for number, node in prompt.items() if node["class_type"] == OURS}
    ends = {f"end {number}": {"class_type": "ModelSave", "inputs": {"model": [number, 0]}} for number in loaders}
    with pytest.raises(PromptFailed) as failure:
        host.post("/prompt", {"prompt": loaders | ends})
    errors = json.loads(failure.value.text)["node_errors"]
    assert ends.keys() <= errors.keys()
    return {loaders[number]["inputs"]["unet_name"] for number in errors.keys() & loaders.keys()}


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
