// "Use FastUSP here" and "Use the ComfyUI loaders again": commands, for which keys can be set, and entries in nodes'
// menus. Each is one step of the workflow's history.

import { app } from "../../scripts/app.js";
import { isOurs, isTheirs, useComfyUI, useFastUSP } from "./convert.js";
import { say, word } from "./words.js";

const USE = {
  convert: useFastUSP,
  can: isTheirs,
  done: word("FastUSP: USP Loader instead of ComfyUI's"),
  after: word("Pick GPUs in USP Loader: auto takes all of one kind. Its menu brings ComfyUI's loader back."),
  nothing: word("There is no Load Diffusion Model, Load Checkpoint or Unet Loader (GGUF) whose model is connected."),
};
const BACK = {
  convert: useComfyUI,
  can: isOurs,
  done: word("FastUSP: ComfyUI's loader instead of USP Loader"),
  nothing: word("There is no USP Loader in this workflow."),
};

/** Loaders whose model goes nowhere are left alone, unless they are asked for one by one. */
const connected = (_graph, node) => Boolean(node.outputs?.[0]?.links?.length);

/** By how much Nodes 2.0, told to show all advanced inputs, draws a widget higher than a new node's size says. */
const NODES_2_ROW = 10;

const plain = (value) => JSON.parse(JSON.stringify(value));

const tools = {
  blank(type) {
    if (!(type in LiteGraph.registered_node_types)) return null;
    const node = LiteGraph.createNode(type);
    const saved = plain(node.serialize());
    if (LiteGraph.vueNodesMode) saved.size[1] += NODES_2_ROW * node.widgets.length;
    return saved;
  },
  newUUID: () => LiteGraph.uuidv4(),
};

/** Converts the open workflow, and says what became of it. chosen: see useFastUSP. */
async function run(action, chosen) {
  const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
  // What was not noticed yet is a step of its own. (checkState: as older front ends call it.)
  (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
  const { flow, changed, left, notes } = action.convert(plain(app.graph.rootGraph.serialize()), chosen, tools);
  if (changed.length) {
    // Loaded as a step that was undone, which keeps the view, the nodes' outputs and what can be undone before it.
    tracker.redoQueue.splice(0, Infinity, flow);
    await tracker.redo();
    // Some nodes settle in the frame after they were loaded; that is no step of its own.
    await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    tracker.activeState = plain(app.graph.rootGraph.serialize());
  }
  tell(action, changed, left, notes);
}

function tell(action, changed, left, notes) {
  const lines = [...changed, ...left.map((what) => say("Left as it is: {what}.", { what })), ...notes];
  if (changed.length && action.after) lines.push(say(action.after));
  app.extensionManager.toast.add({
    severity: changed.length && !left.length ? "success" : "warn",
    summary: changed.length ? say(action.done) : say("FastUSP: nothing was changed"),
    detail: lines.join("\n") || say(action.nothing),
    life: 10000,
  });
}

/** ComfyUI tells what goes wrong in commands, but not in menus' entries. */
function failed(error) {
  console.error(error);
  const summary = say("FastUSP: the workflow was not converted");
  app.extensionManager.toast.add({ severity: "error", summary, detail: String(error) });
}

/** The subgraphs that a node stands for, at whatever depth. */
function subgraphsOf(node) {
  if (!node.subgraph) return [];
  return [node.subgraph, ...node.subgraph.nodes.flatMap(subgraphsOf)];
}

/** A menu's entry for a loader, or for all that are in a subgraph; none where there is nothing to change. */
function entry(action, node, one, all) {
  if (action.can(node.type)) {
    const chosen = (graph, saved) => graph.id === node.graph.id && String(saved.id) === String(node.id);
    return [{ content: one, callback: () => run(action, chosen).catch(failed) }];
  }
  const within = subgraphsOf(node);
  if (!within.some((graph) => graph.nodes.some((inner) => action.can(inner.type)))) return [];
  const ids = within.map((graph) => graph.id);
  const chosen = (graph, saved) => ids.includes(graph.id) && (action === BACK || connected(graph, saved));
  return [{ content: all, callback: () => run(action, chosen).catch(failed) }];
}

app.registerExtension({
  name: "FastUSP.Loaders",
  commands: [
    {
      id: "FastUSP.UseHere",
      label: "Use FastUSP here",
      icon: "pi pi-microchip",
      tooltip: "USP Loader in the place of the workflow's loaders of diffusion models",
      function: () => run(USE, connected),
    },
    {
      id: "FastUSP.UseComfyUI",
      label: "Use the ComfyUI loaders again",
      icon: "pi pi-undo",
      tooltip: "ComfyUI's loaders in the place of all USP Loaders of the workflow",
      function: () => run(BACK, () => true),
    },
  ],
  menuCommands: [{ path: ["FastUSP"], commands: ["FastUSP.UseHere", "FastUSP.UseComfyUI"] }],
  getNodeMenuItems(node) {
    return [
      ...entry(USE, node, "Use FastUSP here", "Use FastUSP here"),
      ...entry(BACK, node, "Use the ComfyUI loader again", "Use the ComfyUI loaders again"),
    ];
  },
});
