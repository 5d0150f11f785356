// "Use FastUSP here" and its reverse, on saved workflows: USP Loader in the place of ComfyUI's loaders. Ids, links,
// titles and positions stay; what the reverse needs beyond them is in the node's properties.fastusp.

import { say } from "./words.js";
import {
  closed, giveBackId, graphs, hide, holders, inputOf, isShared, keep, newId, opened, replaceInputs, setValue, show, take, valueOf,
} from "./workflow.js";

const OURS = "FastUSPLoader";
const UNET = "UNETLoader";
const CHECKPOINT = "CheckpointLoaderSimple";
const GGUF = "UnetLoaderGGUF";
const ADVANCED = "UnetLoaderGGUFAdvanced";

/** The widget of each type that names the file. */
const FILE = { [OURS]: "unet_name", [UNET]: "unet_name", [CHECKPOINT]: "ckpt_name", [GGUF]: "unet_name", [ADVANCED]: "unet_name" };
/** The first widgets of each type, in their order; the values that are not here stay as they are in a new node. */
const WIDGETS = {
  [OURS]: ["unet_name", "weight_dtype"],
  [UNET]: ["unet_name", "weight_dtype"],
  [CHECKPOINT]: ["ckpt_name"],
  [GGUF]: ["unet_name"],
  [ADVANCED]: ["unet_name"],
};

/** The types of weights that UNETLoader has as well, and what it has beside: the same weights, and products in fp8. */
const SLOW = "fp8_e4m3fn";
const COMMON = [SLOW, "fp8_e5m2"];
const FAST = "fp8_e4m3fn_fast";

/** How USP Loader names files in models/checkpoints. */
const MARK = " [checkpoints]";
const READABLE = /\.(safetensors|sft|gguf)$/i;

/** What is written into a node's properties about its type, and the name of this pack there. */
const IDENTITY = ["Node name for S&R", "cnr_id", "aux_id", "ver"];
const PACK = "fastusp";

/** A node's title lies above its place. */
const TITLE = 30;
const GAP = 2 * TITLE;

export const isTheirs = (type) => type !== OURS && type in FILE;
export const isOurs = (type) => type === OURS;

/**
 * Puts USP Loader in the place of ComfyUI's loaders.
 *
 * saved: the workflow as ComfyUI saves it; it is left as it is. chosen(graph, node) says which loaders are meant.
 * tools.blank(type): a new node as ComfyUI saves it, null for a type that it does not know; tools.newUUID().
 * Returns { flow, changed, left, notes }: the new workflow, and in words what was changed, what was left and why, and
 * what else to know.
 */
export function useFastUSP(saved, chosen, tools) {
  const work = begin(saved, tools);
  for (const [graph, node] of find(work.flow, (graph, node) => isTheirs(node.type) && chosen(graph, node))) {
    const files = holders(work.flow, graph, node, FILE[node.type]);
    const reason = whyNot(node, files);
    if (reason) {
      work.left.push(`${named(graph, node, files)}: ${reason}`);
      continue;
    }
    work.changed.push(named(graph, node, files));
    (staysToo(work.flow, graph, node) ? split : replace)(work, graph, node, files);
  }
  return { ...work, flow: closed(work.flow) };
}

/** The reverse, with the same arguments and answer; of a USP Loader that was one from the start as well. */
export function useComfyUI(saved, chosen, tools) {
  const work = begin(saved, tools);
  const found = find(work.flow, (graph, node) => isOurs(node.type) && chosen(graph, node));
  for (const [graph, node] of found.reverse()) {
    const files = holders(work.flow, graph, node, "unet_name");
    const [type, ...more] = typesOf(node, files);
    if (more.length || !tools.blank(type)) {
      const reason = more.length ? say("its files need different loaders") : say("{type} is not installed", { type });
      work.left.push(`${named(graph, node, files)}: ${reason}`);
      continue;
    }
    work.changed.unshift(named(graph, node, files));
    if (!join(work, graph, node, files)) restore(work, graph, node, type, files);
  }
  return { ...work, flow: closed(work.flow) };
}

function begin(saved, tools) {
  return { flow: opened(saved), changed: [], left: [], notes: new Set(), tools };
}

function find(flow, meant) {
  return graphs(flow).flatMap((graph) => graph.nodes.filter((node) => meant(graph, node)).map((node) => [graph, node]));
}

const value = (node, name) => valueOf(node, name, WIDGETS[node.type]);
const put = (node, name, next) => setValue(node, name, next, WIDGETS[node.type]);

/** The files that are named where a value is set. */
function namesOf(files) {
  return files.map((place) => place && value(...place)).filter((name) => typeof name === "string");
}

/** What a node is called in messages: by its title or file, and the subgraph that it is in. */
function named(graph, node, files) {
  const name = node.title ?? (namesOf(files).join(", ") || node.type);
  return graph.name ? say("{name} (in {graph})", { name, graph: graph.name }) : name;
}

/** Why USP Loader cannot take a loader's place; undefined where it can. */
function whyNot(node, files) {
  if (node.type === ADVANCED) return say("put Unet Loader (GGUF) in its place: USP Loader has no dequant_dtype or patch_dtype");
  if (node.type === CHECKPOINT && files.includes(null)) return say("its file name comes from another node");
  const pickle = namesOf(files).find((name) => !READABLE.test(name));
  if (pickle) return say("USP Loader reads safetensors and GGUF files, not {pickle}", { pickle });
}

/** Whether a checkpoint's loader stays: others use it, or the widget that names its file, by a name of its own. */
function staysToo(flow, graph, node) {
  if (node.type !== CHECKPOINT) return false;
  return node.outputs.slice(1).some((output) => output.links?.length) || isShared(flow, graph, node, "ckpt_name");
}

/** Changes a widget's value wherever it is set, and in the node itself, which keeps a value that is not used. */
function changeValues(node, name, places, change) {
  const own = [node, name];
  const all = places.some((place) => place?.[0] === node) ? places : [...places, own];
  for (const place of all) if (place) put(...place, change(value(...place), ...place));
}

const mark = (name) => (typeof name === "string" ? name + MARK : name);
const unmark = (name) => (typeof name === "string" && name.endsWith(MARK) ? name.slice(0, -MARK.length) : name);

/** Makes a node one of another type, which stays where it is. rename: the new name of an input, if it has one. */
function become(work, graph, node, type, rename) {
  const blank = structuredClone(work.tools.blank(type));
  const values = WIDGETS[node.type].map((name) => [rename(name), value(node, name)]);
  replaceInputs(work.flow, graph, node, blank.inputs, rename);
  const [model, ...more] = blank.outputs;
  node.outputs = [{ ...node.outputs[0], ...model, links: node.outputs[0].links }, ...more];
  node.type = type;
  node.widgets_values = blank.widgets_values;
  delete node.widgets_values_named;
  if (blank.widgets_values_named) node.widgets_values_named = blank.widgets_values_named;
  for (const [name, old] of values) if (WIDGETS[type].includes(name)) put(node, name, old);
  node.properties = { ...without(node.properties, [...IDENTITY, "fastusp"]), ...blank.properties };
  return blank;
}

function without(object, keys) {
  return Object.fromEntries(Object.entries(object ?? {}).filter(([key]) => !keys.includes(key)));
}

/** USP Loader in the place of a loader. */
function replace(work, graph, node, files) {
  const { type, size, properties } = node;
  const identity = IDENTITY.filter((key) => key in (properties ?? {})).map((key) => [key, properties[key]]);
  const outputs = node.outputs.slice(1);
  if (type === CHECKPOINT) changeValues(node, "ckpt_name", files, mark);
  if (type === UNET) {
    changeValues(node, "weight_dtype", holders(work.flow, graph, node, "weight_dtype"), (dtype, holder, widget) => {
      if (dtype !== FAST) return dtype;
      work.notes.add(say("{FAST} is {SLOW} now; for products in fp8, USP Optimization Settings has linear = fp8.", { FAST, SLOW }));
      remember(holder, widget);
      return SLOW;
    });
  }
  const { fast } = node.properties?.fastusp ?? {};
  const blank = become(work, graph, node, OURS, (name) => (name === FILE[type] ? "unet_name" : name));
  const record = { type, size, properties: Object.fromEntries(identity), ...(fast && { fast }) };
  if (outputs.length) record.outputs = outputs;
  const larger = [Math.max(size[0], blank.size[0]), Math.max(size[1], blank.size[1])];
  Object.assign(record, raise(graph, node, larger));
  Object.assign(node.properties, { cnr_id: PACK, fastusp: record });
}

/** A loader in the place of USP Loader. */
function restore(work, graph, node, type, files) {
  const record = node.properties?.fastusp ?? {};
  if (type === CHECKPOINT) changeValues(node, "unet_name", files, unmark);
  changeValues(node, "weight_dtype", holders(work.flow, graph, node, "weight_dtype"), (dtype, holder, widget) => {
    const fast = forget(holder, widget);
    if (type === UNET && (dtype === FAST || (dtype === SLOW && fast))) return FAST; // FAST: by one that shares it
    if (dtype == null || dtype === "default" || (type === UNET && COMMON.includes(dtype))) return dtype;
    work.notes.add(say("weight_dtype {dtype} is USP Loader's alone.", { dtype }));
    return "default";
  });
  const names = { unet_name: FILE[type], ...(type === UNET && { weight_dtype: "weight_dtype" }) };
  const blank = become(work, graph, node, type, (name) => names[name]);
  const same = record.type === type;
  if (same) Object.assign(node.properties, record.properties);
  if (same && record.outputs) node.outputs.splice(1, Infinity, ...record.outputs);
  node.size = (same && record.size) || [node.size[0], blank.size[1]];
  lower(node, record);
}

/** Which loaders a USP Loader's files need; where none is known, what it was. */
function typesOf(node, files) {
  const types = namesOf(files).map((name) => {
    return name.endsWith(MARK) ? CHECKPOINT : /\.gguf$/i.test(name) ? GGUF : UNET;
  });
  return types.length ? [...new Set(types)] : [node.properties?.fastusp?.type ?? UNET];
}

/** In a widget's holder, that it was set to what USP Loader does not have. */
function remember(holder, widget) {
  keep(holder, "fast", [...(holder.properties?.fastusp?.fast ?? []), widget]);
}

/** Whether it was; the memory is gone then. */
function forget(holder, widget) {
  const fast = take(holder, "fast") ?? [];
  const others = fast.filter((other) => other !== widget);
  if (others.length) keep(holder, "fast", others);
  return fast.includes(widget);
}

/** USP Loader beside a checkpoint's loader, which goes on to give text encoder and VAE. */
function split(work, graph, node, files) {
  const blank = structuredClone(work.tools.blank(OURS));
  const id = newId(work.flow, "Node");
  const pos = room(graph, node, blank.size);
  const record = { type: CHECKPOINT, beside: node.id };
  const properties = { ...blank.properties, cnr_id: PACK, fastusp: record };
  const made = { ...blank, id, pos, order: node.order, mode: node.mode, properties };
  made.outputs[0].links = node.outputs[0].links;
  node.outputs[0].links = null;
  for (const link of graph.links) if (made.outputs[0].links?.includes(link.id)) link.origin_id = id;
  graph.nodes.push(made);
  put(made, "unet_name", mark(value(node, "ckpt_name")));
  if (!files.some(([holder]) => holder === node)) {
    const [like, input] = [inputOf(node, "ckpt_name"), inputOf(made, "unet_name")];
    show(work.flow, graph, made, input, like, mark, work.tools.newUUID);
  }
}

/** Undoes `split`; answers false where USP Loader is not beside a checkpoint's loader, or has another file by now. */
function join(work, graph, node, files) {
  const beside = node.properties?.fastusp?.beside;
  const old = graph.nodes.find((other) => other.id === beside && other.type === CHECKPOINT);
  if (!old) return false;
  const plain = (places) => JSON.stringify(places.map((place) => place && unmark(value(...place))));
  if (plain(files) !== plain(holders(work.flow, graph, old, "ckpt_name"))) return false;
  for (const input of node.inputs) hide(work.flow, graph, node, input.name);
  for (const link of graph.links) if (link.origin_id === node.id) link.origin_id = old.id;
  const links = node.outputs[0].links;
  if (links?.length) old.outputs[0].links = [...(old.outputs[0].links ?? []), ...links];
  graph.nodes.splice(graph.nodes.indexOf(node), 1);
  giveBackId(work.flow, "Node", node.id);
  return true;
}

/** A place for another node of that size: above, left of or below a node, where nothing lies, or else above. */
function room(graph, node, size) {
  const [x, y] = node.pos;
  const places = [
    [x, y - size[1] - GAP],
    [x - size[0] - GAP, y],
    [x, y + node.size[1] + GAP],
  ];
  return places.find((pos) => free(graph, pos, size)) ?? places[0];
}

/** Whether no node but one lies where another would. */
function free(graph, [x, y], [width, height], except) {
  const apart = (from, length, other, otherLength) => from + length <= other || other + otherLength <= from;
  return graph.nodes.every((node) => {
    const below = node.flags?.collapsed ? 0 : node.size[1];
    const beside = apart(x, width, node.pos[0], node.size[0]);
    return node === except || beside || apart(y - TITLE, height + TITLE, node.pos[1] - TITLE, below + TITLE);
  });
}

/** Makes room for more widgets: below, or above where the node would cover another one. Answers what `lower` needs. */
function raise(graph, node, size) {
  const [x, y] = node.pos;
  const raised = [x, y - size[1] + node.size[1]];
  const stays = raised[1] >= y || free(graph, node.pos, size, node) || !free(graph, raised, size, node);
  node.size = size;
  if (stays) return {};
  node.pos = raised;
  return { y, raised: y - raised[1] };
}

/** Undoes `raise`; a node that was moved since goes down by as much. */
function lower(node, { y, raised }) {
  if (raised === undefined) return;
  node.pos = [node.pos[0], node.pos[1] === y - raised ? y : node.pos[1] + raised];
}
