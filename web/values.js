// The values of a node's widgets in the open workflow, wherever they are set: in the node, in a primitive, on the boxes
// of the subgraphs that show them.

import { app } from "../../scripts/app.js";

/** The id that links from a subgraph's own inputs have as their origin. */
const INPUTS = -10;
const SETTINGS = "FastUSPSettings";

const root = () => app.rootGraph ?? app.graph.rootGraph ?? app.graph;

/** The nodes that stand for a subgraph. */
const boxes = (subgraph) => allNodes().filter((node) => node.subgraph === subgraph);

/** The nodes of the workflow and of its subgraphs. */
const allNodes = () => [root(), ...(root().subgraphs?.values() ?? [])].flatMap((graph) => graph.nodes);

/** The nodes of a kind, in the workflow and in its subgraphs. */
export const allOf = (comfyClass) => allNodes().filter((node) => node.comfyClass === comfyClass);

function linkOf(graph, id) {
  return id == null ? undefined : (graph.getLink?.(id) ?? graph.links[id]);
}

const linkInto = (node, name) => linkOf(node.graph, node.inputs?.find((input) => input.name === name)?.link);

/** [node, widget] wherever a node's widget is set; null for a value that another node computes. */
export function holders(node, name) {
  const link = linkInto(node, name);
  if (!link) {
    const widget = node.widgets?.find((own) => own.name === name);
    return widget ? [[node, widget]] : [];
  }
  if (Number(link.origin_id) === INPUTS) {
    const shown = node.graph.inputs[link.origin_slot].name;
    return boxes(node.graph).flatMap((box) => holders(box, shown));
  }
  const origin = node.graph.getNodeById(link.origin_id);
  if (origin?.type === "Reroute") return holders(origin, origin.inputs[0].name);
  return origin?.type === "PrimitiveNode" ? [[origin, origin.widgets[0]]] : [null];
}

/** A widget's value; null where another node computes it, or boxes of a subgraph differ in it; undefined without. */
export function valueOf(node, name) {
  const found = holders(node, name);
  if (found.includes(null)) return null;
  const values = found.map(([, widget]) => widget.value);
  return values.every((value) => value === values[0]) ? values[0] : null;
}

/** Sets a widget's value wherever it is set, as its user would. Answers whether it could. */
export function setValue(node, name, value) {
  const found = holders(node, name);
  if (!found.length || found.includes(null)) return false;
  for (const [holder, widget] of found) {
    widget.value = value;
    widget.callback?.(value, app.canvas, holder);
    holder.setDirtyCanvas?.(true, true);
  }
  return true;
}

/** The node whose output comes to an input, through reroutes, into subgraphs and out of them; undefined for none. */
export function sourceOf(node, name) {
  return originOf(node.graph, linkInto(node, name));
}

function originOf(graph, link) {
  if (!link) return undefined;
  if (Number(link.origin_id) === INPUTS) {
    const [box] = boxes(graph);
    return box && sourceOf(box, graph.inputs[link.origin_slot].name);
  }
  const origin = graph.getNodeById(link.origin_id);
  if (origin?.type === "Reroute") return sourceOf(origin, origin.inputs[0].name);
  if (!origin?.subgraph) return origin;
  const inner = origin.subgraph;
  return originOf(inner, linkOf(inner, inner.outputs[link.origin_slot].linkIds?.[0]));
}

/** A loader's USP Optimization Settings; undefined where there is none that works, or another node gives them. */
export function settingsNode(node) {
  const source = sourceOf(node, "settings");
  return source?.comfyClass === SETTINGS && source.mode === 0 ? source : undefined;
}

/** The options in it that are known; none without it. */
export function settingsOf(node) {
  const source = settingsNode(node);
  const options = (source?.widgets ?? []).map(({ name }) => [name, valueOf(source, name)]);
  return Object.fromEntries(options.filter(([, value]) => value != null));
}

const opened = () => app.extensionManager?.workflow?.activeWorkflow;

// The id of graphs that have none; they get one when the page is loaded anew.
const NO_ID = "00000000-0000-0000-0000-000000000000";

/** Whether the open workflow is the one of a prompt. id: of that; null where whoever queued it gave none. */
export const isOpen = (id) => [null, NO_ID, root().id].includes(id);

/** Finds a node again when its workflow was loaded anew, as undo does; what it answers is undefined in another one. */
export function finder(node) {
  const { id, type } = node;
  const flow = opened();
  const graph = node.graph === root() ? undefined : node.graph.id; // the workflow's own may get another id
  return () => {
    const home = graph === undefined ? root() : root().subgraphs.get(graph);
    const found = opened() === flow ? home?.getNodeById(id) : undefined;
    return found?.type === type ? found : undefined;
  };
}

/** The id under which a node is executed: behind those of the boxes around it. */
export function executionId(node) {
  const [box] = node.graph === root() ? [] : boxes(node.graph);
  return box ? `${executionId(box)}:${node.id}` : String(node.id);
}

const samples = (node) => node.inputs?.some(({ name }) => name === "latent_image");

/** Whether what a sampler is given comes from a node, and not by way of another sampler. */
function comesFrom(sampler, node) {
  const reached = new Set([sampler]);
  for (const one of reached)
    for (const { name } of one.inputs ?? []) {
      const source = sourceOf(one, name);
      if (source === node) return true;
      if (source && !samples(source)) reached.add(source);
    }
  return false;
}

/** An integer of a node, its own or a primitive's; undefined for what is known when it runs. */
function integer(node, name) {
  const value = valueOf(node, name);
  const source = value === null ? sourceOf(node, name) : undefined;
  const known = source?.comfyClass === "PrimitiveInt" ? valueOf(source, "value") : value;
  return Number.isInteger(known) ? known : undefined;
}

/** The size of the empty latent of a sampler that a node's model comes to: width and height in pixels; undefined where
 *  there is none, or one of them is not known. Asks nothing of the widgets: those of other packs may do things then. */
export function sizeOfPictures(node) {
  for (const sampler of allNodes().filter((one) => samples(one) && one.mode === 0 && comesFrom(one, node))) {
    const latent = sourceOf(sampler, "latent_image");
    if (!/^Empty\w*Latent/.test(latent?.comfyClass)) continue;
    const [width, height] = ["width", "height"].map((name) => integer(latent, name));
    if (width && height) return { width, height };
  }
  return undefined;
}

/** The open workflow as ComfyUI saves it, for prompts. */
export const workflow = () => root().serialize();

/** Has the workflow's history take what was changed as one step. */
export function keepStep() {
  const tracker = opened()?.changeTracker;
  // checkState: as older front ends call it.
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}
