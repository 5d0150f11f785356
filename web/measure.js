// Measure here, of USP Loader: queues USP Measure (nodes/measuring.py) with the node's values, under its id, shows the
// rows as they are measured, and writes what one of them needs into the nodes.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { applyRow } from "./apply.js";
import { element } from "./element.js";
import { say, size, word } from "./words.js";
import { allOf, executionId, finder, isOpen, settingsNode, settingsOf, sizeOfPictures, valueOf, workflow } from "./values.js";

const STYLE = `
.fastusp-measure { position: fixed; bottom: 72px; right: 24px; z-index: 1000; max-width: min(840px, 90vw);
  max-height: max(240px, calc(100vh - 20rem)); /* ComfyUI's messages are above it */
  overflow: auto; padding: 12px; border: 1px solid var(--border-color); border-radius: 8px; box-sizing: border-box;
  background: var(--comfy-menu-bg); color: var(--fg-color); font-size: 13px; line-height: 1.5; user-select: text; }
.fastusp-measure h2 { margin: 0 0 8px; font-size: 15px; font-weight: 600; }
.fastusp-measure p { margin: 4px 0; color: var(--descrip-text); overflow-wrap: anywhere; }
.fastusp-measure div { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; margin: 4px 0; }
.fastusp-measure input[type="number"] { width: 72px; background: var(--comfy-input-bg); color: var(--input-text);
  border: 1px solid var(--border-color); border-radius: 4px; padding: 1px 4px; }
.fastusp-measure progress { width: 100%; accent-color: var(--p-primary-color, #3b82f6); }
.fastusp-measure table { border-collapse: collapse; }
.fastusp-measure th, .fastusp-measure td { padding: 2px 10px 2px 0; text-align: left; font-weight: normal; }
.fastusp-measure td:nth-child(2) { white-space: nowrap; }
.fastusp-measure th { color: var(--descrip-text); }
.fastusp-measure tr.best td { font-weight: 600; }
.fastusp-measure button { padding: 2px 10px; border: 1px solid var(--border-color); border-radius: 4px; cursor: pointer;
  background: var(--comfy-input-bg); color: var(--input-text); font: inherit; }
.fastusp-measure button:disabled { opacity: 0.5; cursor: default; }
`;

const HEADS = [word("ranks"), word("layout"), "wire", "linear", "attention", word("ms a step"), word("x one rank"), word("memory a rank"), word("changes"), ""];
const LOADER_INPUTS = ["unet_name", "weight_dtype", "gpus"];

/** What is asked for beside the node's values: label, and what is in the field at first. */
const FIELDS = { width: [word("width"), 1024], height: [word("height"), 1024], steps: [word("timed steps"), 8] };
const SWITCHES = { every_layout: word("every legal layout"), exactness: word("what 8 bits change (verify)") };

/** By how much 8 bits change a step, and the latents at the end. */
function changed(changes) {
  if (!changes) return "";
  if (changes.problem) return changes.problem;
  const [step, latents] = [changes.evaluation, changes.latents].map((share) => (100 * share).toFixed(2));
  return say("{step} %, latents {latents} %", { step, latents });
}

/** A row's cells, but for the last. */
export function cells({ ranks, layout, wire, linear, attention, ms, gain, nbytes, problem, changes }) {
  const what = [String(ranks), layout, wire, linear, attention];
  if (ms === null) return [...what, say("not run"), "", "", problem];
  return [...what, ms.toFixed(1), gain === null ? "" : gain.toFixed(2), size(nbytes), changed(changes)];
}

/** The prompt that measures for a loader: its values and `options`. Raises an Error for one that is not known. */
function promptFor(node, options) {
  const values = Object.fromEntries(LOADER_INPUTS.map((name) => [name, valueOf(node, name)]));
  const unknown = LOADER_INPUTS.find((name) => values[name] == null);
  if (unknown) throw new Error(say("Set {unknown} in USP Loader: it comes from another node, and is known when that runs", { unknown }));
  const id = executionId(node);
  const measure = { class_type: "FastUSPMeasure", inputs: { ...values, ...options } };
  const source = settingsNode(node);
  if (!source) return { [id]: measure };
  measure.inputs.settings = [executionId(source), 0];
  return { [id]: measure, [executionId(source)]: { class_type: "FastUSPSettings", inputs: settingsOf(node) } };
}

const BEFORE = word(
  "Times steps on 1, 2, ... all of the node's devices: on GPUs that takes minutes, since each of these starts workers, " +
    "loads the model and compiles. The workers of other pools, and ComfyUI's models, leave the devices meanwhile. " +
    "A step is of one prompt, as with cfg = 1: that cfg above 1 has two, which groups of ranks may share, is not measured.",
);

// How it ends, where it does not with an error.
const MEASURED = word("measured");
const CANCELLED = word("cancelled: what was measured before is below");
const BEFORE_IT_BEGAN = word("cancelled before it began");
const LOST = word("Measure again: this one is no longer in ComfyUI's queue, which was cleared, or ComfyUI was started anew");

/** One measurement, from the question to its end: a window in the page. */
class Measurement {
  constructor(node) {
    this.find = finder(node);
    this.fields = {};
    this.stopping = false;
    const known = sizeOfPictures(node) ?? {};
    const fields = Object.entries(FIELDS).map(([name, [label, value]]) => this.field(name, label, "number", { value: known[name] ?? value }));
    const switches = Object.entries(SWITCHES).map(([name, label]) => this.field(name, label, "checkbox", {}));
    this.line = element("p", say(BEFORE));
    this.line.setAttribute("role", "status");
    this.bar = element("progress");
    this.bar.hidden = true;
    this.table = element("table");
    this.said = element("section");
    this.start = this.button(say("Measure"), () => this.queue());
    this.cancel = this.button(say("Cancel"), () => this.stop());
    this.cancel.disabled = true;
    const actions = element("div", this.start, this.cancel, this.button(say("Close"), () => this.close()));
    const title = element("h2", say("Measure here: {title}", node));
    this.root = element("section", element("style", STYLE), title, element("div", ...fields), element("div", ...switches));
    this.root.append(actions, this.line, this.bar, this.said, this.table); // which may have to be scrolled
    this.root.className = "fastusp-measure";
    this.root.setAttribute("role", "dialog");
    this.root.setAttribute("aria-label", say("FastUSP: Measure here"));
    this.root.onkeydown = (event) => {
      event.stopPropagation(); // keys of the canvas: Delete would delete nodes
      if (event.key === "Escape") this.close();
    };
    document.body.append(this.root);
    this.start.focus();
  }

  node() {
    const node = this.find();
    if (!node) throw new Error(say("Open the workflow that was measured: its USP Loader is not in this one"));
    return node;
  }

  field(name, label, type, more) {
    const input = Object.assign(element("input"), { type, ...more });
    this.fields[name] = input;
    return element("label", ...(type === "number" ? [`${say(label)} `, input] : [input, ` ${say(label)}`]));
  }

  button(label, act) {
    const made = element("button", label);
    made.onclick = async () => {
      try {
        await act();
      } catch (error) {
        this.line.textContent = String(error.message ?? error);
      }
    };
    return made;
  }

  async queue() {
    const numbers = Object.keys(FIELDS).map((name) => [name, this.fields[name].valueAsNumber || 0]);
    const switches = Object.keys(SWITCHES).map((name) => [name, this.fields[name].checked]);
    const output = promptFor(this.node(), Object.fromEntries([...numbers, ...switches]));
    this.start.disabled = true;
    this.show({ rows: [], said: [] });
    this.line.textContent = say("waiting for its turn in ComfyUI's queue");
    this.id = undefined;
    this.early = [];
    try {
      this.id = (await api.queuePrompt(0, { output, workflow: workflow() })).prompt_id;
    } catch (error) {
      this.early = undefined;
      return this.ended(refusal(error));
    }
    this.cancel.disabled = this.stopping = false;
    const early = this.early;
    this.early = undefined;
    for (const [type, detail] of early) this.heard(type, detail);
  }

  /** Takes it from the queue; what runs already is interrupted, and its processes end. */
  async stop() {
    this.cancel.disabled = this.stopping = true;
    this.line.textContent = say("stopping");
    const post = (route, body) =>
      api.fetchApi(route, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    await post("/queue", { delete: [this.id] });
    if (this.running) await post("/interrupt", { prompt_id: this.id });
    else this.ended(say(BEFORE_IT_BEGAN));
  }

  /** Looks whether its prompt is still in the queue: one that was cleared ends without a word, and so does ComfyUI. */
  async look() {
    const id = this.id;
    if (id === undefined || !this.start.disabled) return;
    const read = async (route) => (await api.fetchApi(route)).json();
    const queue = await read("/queue");
    if ([...queue.queue_running, ...queue.queue_pending].some(([, prompt]) => prompt === id)) return;
    const past = Object.values((await read(`/history/${id}`))[id]?.outputs ?? {}).find(({ fastusp }) => fastusp);
    if (this.id !== id || !this.start.disabled) return; // it has told its end meanwhile
    if (past) this.show(past.fastusp[0]);
    const lost = this.stopping ? (this.running ? CANCELLED : BEFORE_IT_BEGAN) : LOST;
    this.ended(say(past ? MEASURED : lost));
  }

  /** While it is measured the window is only hidden: Measure here of the node brings it back, and so does the end. */
  close() {
    if (this.root.contains(document.activeElement)) this.opener?.focus();
    this.root.hidden = true;
    if (!this.cancel.disabled) return;
    this.root.remove();
    if (current === this) current = undefined;
  }

  heard(type, detail) {
    if (this.id === undefined) this.early?.push([type, detail]); // before the answer that names the prompt
    if (this.id === undefined || detail.prompt_id !== this.id) return;
    if (type === "execution_start") this.running = true;
    if (type === "executed" && detail.output?.fastusp) this.show(detail.output.fastusp[0]);
    if (type === "execution_success") this.ended(say(MEASURED));
    if (type === "execution_interrupted") this.ended(say(CANCELLED));
    if (type === "execution_error") this.ended(detail.exception_message);
  }

  measuring({ prompt, doing, done, total, table }) {
    this.id ??= prompt;
    this.running = this.start.disabled = true;
    this.cancel.disabled = this.stopping;
    if (!this.stopping) this.line.textContent = doing;
    this.bar.hidden = false;
    [this.bar.max, this.bar.value] = [total, done];
    this.show(table);
  }

  ended(text) {
    this.line.textContent = text;
    this.running = this.stopping = false;
    this.bar.hidden = true;
    this.start.disabled = false;
    this.cancel.disabled = true;
    this.root.hidden = false;
  }

  show({ rows, best, quickest, said }) {
    const drawn = JSON.stringify([rows, best, quickest]);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const lines = rows.map((row, at) => {
      const use = this.button(say("Apply"), () => applyRow(this.node(), row));
      use.hidden = row.ms === null;
      const line = element("tr", ...cells(row).map((text) => element("td", text)), element("td", use));
      line.className = at === best || at === quickest ? "best" : "";
      return line;
    });
    const heads = element("tr", ...HEADS.map((text) => element("th", say(text))));
    this.table.replaceChildren(...(lines.length ? [heads, ...lines] : []));
    this.said.replaceChildren(...said.map((text) => element("p", text)));
  }
}

/** What ComfyUI says of a prompt that it does not take: the node's own words, if there are any. */
function refusal(error) {
  const nodes = Object.values(error.response?.node_errors ?? {});
  return nodes[0]?.errors?.[0]?.details || error.response?.error?.message || String(error.message ?? error);
}

let current;

/** Opens the window for a node; the one of a measurement that goes on is shown instead. */
export function measureHere(node) {
  const opener = document.activeElement; // which has the focus again when it is closed
  if (current && !current.cancel.disabled) current.root.hidden = false;
  else {
    current?.root.remove();
    current = new Measurement(node);
  }
  current.opener = opener;
}

/** The measurement that an event is of; a page that was loaded meanwhile has no window for it yet. */
function followed({ node: id, prompt, workflow: flow }) {
  if (current?.id === prompt) return current;
  const node = isOpen(flow) ? allOf("FastUSPLoader").find((loader) => executionId(loader) === id) : undefined;
  if (!node) return undefined;
  if (!current) measureHere(node);
  return current.id === undefined && current.find() === node ? current : undefined;
}

app.registerExtension({
  name: "FastUSP.Measure",
  setup() {
    for (const type of ["execution_start", "executed", "execution_success", "execution_interrupted", "execution_error"])
      api.addEventListener(type, ({ detail }) => current?.heard(type, detail));
    // Whenever the queue changes, and when a connection is made again.
    api.addEventListener("status", ({ detail }) => {
      if (detail) current?.look().catch((error) => console.warn("FastUSP: ComfyUI's queue was not read:", error));
    });
    api.addEventListener("fastusp.measuring", ({ detail }) => followed(detail)?.measuring(detail));
  },
});
