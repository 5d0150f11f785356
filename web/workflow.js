// Saved workflows as data: the graphs in them (the workflow's own and its subgraphs'), links, values of widgets, and
// widgets that a subgraph shows on its boxes. A *box* is a node that stands for a subgraph.

/** The id that links from a subgraph's own inputs have as their origin. */
const INPUTS = -10;

/** A copy that may be changed; the links of its own graph, which are saved as arrays, are objects as in subgraphs. */
export function opened(saved) {
  const flow = structuredClone(saved);
  flow.links = flow.links.map(([id, origin_id, origin_slot, target_id, target_slot, type]) => {
    return { id, origin_id, origin_slot, target_id, target_slot, type };
  });
  return flow;
}

/** What `opened` has opened, as ComfyUI loads it. */
export function closed(flow) {
  const links = flow.links.map((link) => {
    return [link.id, link.origin_id, link.origin_slot, link.target_id, link.target_slot, link.type];
  });
  return { ...flow, links };
}

/** The workflow's own graph and those of its subgraphs. */
export function graphs(flow) {
  return [flow, ...(flow.definitions?.subgraphs ?? [])];
}

/** [graph, box] for each node that stands for a subgraph. */
function boxes(flow, subgraph) {
  return graphs(flow).flatMap((graph) => {
    return graph.nodes.filter((node) => node.type === subgraph.id).map((node) => [graph, node]);
  });
}

export function inputOf(node, name) {
  return node.inputs?.find((input) => input.name === name);
}

function linkInto(graph, input) {
  return graph.links.find((link) => link.id === input?.link);
}

/** Node ids and link ids are counted together for all graphs of a workflow. kind: "Node" or "Link". */
export function newId(flow, kind) {
  const last = flow[`last_${kind.toLowerCase()}_id`];
  setLastId(flow, kind, last, last + 1);
  return last + 1;
}

/** Undoes newId, if nothing was made since. */
export function giveBackId(flow, kind, id) {
  if (flow[`last_${kind.toLowerCase()}_id`] === id) setLastId(flow, kind, id, id - 1);
}

function setLastId(flow, kind, from, to) {
  flow[`last_${kind.toLowerCase()}_id`] = to;
  for (const { state } of flow.definitions?.subgraphs ?? []) // the same count, but for older front ends
    if (state?.[`last${kind}Id`] === from) state[`last${kind}Id`] = to;
}

/** Takes a link out of a graph, and out of what it joined. */
export function removeLink(flow, graph, id) {
  const at = graph.links.findIndex((link) => link.id === id);
  if (at < 0) return;
  const [link] = graph.links.splice(at, 1);
  const origin = graph.nodes.find((node) => node.id === link.origin_id)?.outputs?.[link.origin_slot];
  const target = graph.nodes.find((node) => node.id === link.target_id)?.inputs?.[link.target_slot];
  if (origin?.links) origin.links = origin.links.filter((other) => other !== id);
  if (target) target.link = null;
  if (link.origin_id === INPUTS) {
    const slot = graph.inputs[link.origin_slot];
    slot.linkIds = slot.linkIds.filter((other) => other !== id);
  }
  giveBackId(flow, "Link", id);
}

/** Gives a node other inputs. Links follow the names; those of inputs that are gone (rename: undefined) go too. */
export function replaceInputs(flow, graph, node, inputs, rename) {
  const before = node.inputs ?? [];
  const slots = before.map((old) => inputs.findIndex((input) => input.name === rename(old.name)));
  before.forEach((old, slot) => {
    if (slots[slot] < 0) hide(flow, graph, node, old.name);
  });
  const floating = graph.floatingLinks?.filter((link) => link.target_id !== node.id || slots[link.target_slot] >= 0);
  if (floating) graph.floatingLinks = floating;
  for (const link of [...graph.links, ...(floating ?? [])])
    if (link.target_id === node.id) link.target_slot = slots[link.target_slot];
  node.inputs = inputs.map((input, at) => ({ ...before[slots.indexOf(at)], ...input, link: null }));
  before.forEach((old, slot) => {
    if (slots[slot] >= 0) node.inputs[slots[slot]].link = old.link;
  });
}

/** The value of a node's widget. names: its widgets in their order; those of a box are its inputs with widgets. */
export function valueOf(node, name, names = widgetNames(node)) {
  return node.widgets_values?.[names.indexOf(name)];
}

export function setValue(node, name, value, names = widgetNames(node)) {
  if (node.widgets_values) node.widgets_values[names.indexOf(name)] = value;
  if (node.widgets_values_named) node.widgets_values_named[name] = value;
}

/** Keeps in a node's properties what a conversion's reverse needs. */
export function keep(node, key, value) {
  node.properties = { ...node.properties, fastusp: { ...node.properties?.fastusp, [key]: value } };
}

/** Gives back what `keep` has kept, which is gone then. */
export function take(node, key) {
  const { [key]: value, ...others } = node.properties?.fastusp ?? {};
  if (value === undefined) return undefined;
  node.properties = { ...node.properties, fastusp: others };
  if (!Object.keys(others).length) delete node.properties.fastusp;
  return value;
}

function widgetNames(box) {
  return box.inputs.filter((input) => input.widget).map((input) => input.name);
}

/**
 * Where the value of a node's widget is set: [node, name of the widget], the node's own or those of the boxes that show
 * it, at whatever depth; null for a value that another node computes.
 */
export function holders(flow, graph, node, name) {
  const link = linkInto(graph, inputOf(node, name));
  if (!link) return [[node, name]];
  if (link.origin_id !== INPUTS) return [null];
  const shown = graph.inputs[link.origin_slot].name;
  return boxes(flow, graph).flatMap(([outer, box]) => holders(flow, outer, box, shown));
}

/** Whether what sets a node's widget sets another one as well. */
export function isShared(flow, graph, node, name) {
  const link = linkInto(graph, inputOf(node, name));
  if (link?.origin_id !== INPUTS) return false;
  const slot = graph.inputs[link.origin_slot];
  return slot.linkIds.length > 1 || boxes(flow, graph).some(([outer, box]) => isShared(flow, outer, box, slot.name));
}

/**
 * Shows a widget of a node in a subgraph wherever another widget of the same subgraph is shown, with values of its own.
 * like: the input that shows the other one; valueFor: the new value for the other's; newUUID makes ids of inputs.
 */
export function show(flow, graph, node, input, like, valueFor, newUUID) {
  const other = graph.inputs[linkInto(graph, like).origin_slot];
  const taken = graph.inputs.map((slot) => slot.name);
  let name = input.name;
  for (let number = 1; taken.includes(name); number++) name = `${input.name}_${number}`;
  const id = newId(flow, "Link");
  const ends = { target_id: node.id, target_slot: node.inputs.indexOf(input), type: input.type };
  graph.links.push({ id, origin_id: INPUTS, origin_slot: graph.inputs.length, ...ends });
  graph.inputs.push({ id: newUUID(), name, type: input.type, linkIds: [id] });
  input.link = id;
  for (const [outer, box] of boxes(flow, graph)) {
    const shown = { name, type: input.type, widget: { name }, link: null };
    const value = valueFor(valueOf(box, other.name));
    if (!box.properties?.fastusp?.size) keep(box, "size", box.size); // ComfyUI makes it larger
    box.inputs.push(shown);
    setValue(box, name, value);
    const above = inputOf(box, other.name);
    if (above.link != null) show(flow, outer, box, shown, above, valueFor, newUUID);
  }
}

/** Undoes `show`: takes away the subgraph's input that a node's input hangs on, unless others do as well. */
export function hide(flow, graph, node, name) {
  const link = linkInto(graph, inputOf(node, name));
  if (!link) return;
  const at = link.origin_slot;
  const slot = graph.inputs?.[at];
  if (link.origin_id !== INPUTS || slot.linkIds.length > 1) return removeLink(flow, graph, link.id);
  for (const [outer, box] of boxes(flow, graph).reverse()) {
    hide(flow, outer, box, slot.name);
    const gone = box.inputs.findIndex((shown) => shown.name === slot.name);
    box.widgets_values?.splice(widgetNames(box).indexOf(slot.name), 1);
    delete box.widgets_values_named?.[slot.name];
    box.inputs.splice(gone, 1);
    box.size = take(box, "size") ?? box.size;
    for (const other of outer.links)
      if (other.target_id === box.id && other.target_slot > gone) other.target_slot -= 1;
  }
  removeLink(flow, graph, link.id);
  graph.inputs.splice(at, 1);
  for (const other of graph.links)
    if (other.origin_id === INPUTS && other.origin_slot > at) other.origin_slot -= 1;
}
