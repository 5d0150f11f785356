// What a measured row needs, written into USP Loader and its USP Optimization Settings as one step of the workflow's
// history.

import { app } from "../../scripts/app.js";
import { say } from "./words.js";
import { keepStep, setValue, settingsNode, sourceOf, valueOf } from "./values.js";

const SETTINGS = "FastUSPSettings";
/** Between the new settings' node and the loader. */
const GAP = 60;

/** row: of USP Measure's table. */
export function applyRow(node, row) {
  const { wire, linear, attention } = row;
  const options = { wire, linear, attention };
  const values = { ...row.values, ...batches(node, row) };
  const isDefault = wire === "exact" && linear === "exact" && attention === "auto";
  const left = [];
  const put = (owner, values) => {
    for (const [name, value] of Object.entries(values)) if (!setValue(owner, name, value)) left.push(`${name} = ${value}`);
  };
  keepStep(); // what was not noticed yet is a step of its own
  put(node, values);
  const settings = settingsNode(node) ?? (isDefault ? undefined : newSettings(node));
  if (settings) put(settings, options);
  else if (sourceOf(node, "settings") && !isDefault) left.push(...Object.entries(options).map(([name, value]) => `${name} = ${value}`));
  keepStep();
  const set = Object.entries({ ...values, ...options }).map(([name, value]) => `${name} = ${value}`);
  app.extensionManager?.toast?.add({
    severity: left.length ? "warn" : "success",
    summary: left.length ? say("FastUSP: set these where they come from") : say("FastUSP: applied; one undo takes it back"),
    detail: (left.length ? left : set).join(", "),
    life: 8000,
  });
}

/** batch_parallel = on wants an even number of ranks, and has degrees be those of half of them: what cannot be so is
 *  auto. */
function batches(node, { ranks, values: { ulysses, ring } }) {
  const fits = ranks % 2 === 0 && !ulysses && !ring;
  return fits || ["auto", "off"].includes(valueOf(node, "batch_parallel")) ? {} : { batch_parallel: "auto" };
}

/** A settings' node at the left of a loader that has none; undefined where it has another kind's. */
function newSettings(node) {
  if (sourceOf(node, "settings")) return undefined;
  const made = LiteGraph.createNode(SETTINGS);
  made.pos = [node.pos[0] - made.size[0] - GAP, node.pos[1]];
  node.graph.add(made);
  made.connect(0, node, "settings");
  return made;
}
