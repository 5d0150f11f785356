// What is below USP Loader's widgets: the GPUs that are there, to be picked, and what the node's values would come to
// (POST /fastusp/plan), asked while they are edited.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { element } from "./element.js";
import { measureHere } from "./measure.js";
import { post, readGpus } from "./pools.js";
import { say, size } from "./words.js";
import { allOf, keepStep, setValue, settingsOf, valueOf } from "./values.js";

const LOADER = "FastUSPLoader";
const INPUTS = ["unet_name", "weight_dtype", "gpus", "ulysses", "ring", "batch_parallel"];

/** Between the last edit and the question. */
const PAUSE_MS = 300;
/** How old what GPUs have free may be. */
const FRESH_MS = 5000;
/** Of two rows of chips and five lines. */
const HEIGHT = 128;

const STYLE = `
.fastusp-choose { display: flex; flex-direction: column; gap: 4px; height: 100%; min-height: ${HEIGHT}px; padding: 2px 4px;
  box-sizing: border-box; overflow-y: auto; color: var(--descrip-text); font-size: 11px; line-height: 1.35; }
.fastusp-choose div { display: flex; flex-wrap: wrap; gap: 4px; }
.fastusp-choose div div { display: contents; }
.fastusp-choose button { padding: 1px 8px; border: 1px solid var(--border-color); border-radius: 4px; cursor: pointer;
  background: var(--comfy-input-bg); color: var(--input-text); font: inherit; }
.fastusp-choose button[aria-pressed="true"] { border-color: var(--p-primary-color, #3b82f6); }
.fastusp-choose button:disabled { opacity: 0.5; cursor: default; }
.fastusp-choose p { margin: 0; overflow-wrap: anywhere; user-select: text; }
.fastusp-choose .problem { color: var(--error-text, #ff4444); }
`;

const choosers = new Set();

/** What a loader's inputs are; null for one that another node computes. */
export function valuesOf(node) {
  const values = INPUTS.map((name) => [name, valueOf(node, name)]).filter(([, value]) => value !== undefined);
  return { ...Object.fromEntries(values), settings: settingsOf(node) };
}

/** A GPU in a few words: number, name and what is free of its memory. */
function gpuLabel({ index, name, used, total }) {
  const free = total ? `, ${say("{size} free", { size: size(total - used) })}` : "";
  return `${index}: ${name.replace(/^NVIDIA (GeForce )?/, "")}${free}`;
}

let asked = -Infinity;
let answered;

/** The GPUs as they are now, asked once for all nodes. */
function gpusNow() {
  if (performance.now() - asked > FRESH_MS) {
    asked = performance.now();
    answered = readGpus();
  }
  return answered;
}

class Chooser {
  constructor(node) {
    this.node = node;
    this.picker = element("div");
    this.picker.setAttribute("role", "group");
    this.picker.setAttribute("aria-label", say("Devices"));
    this.told = element("section");
    this.told.setAttribute("role", "status"); // changes are announced
    const measure = element("button", say("Measure here ..."));
    measure.title = say("Times steps on these devices, to choose by");
    measure.onclick = () => measureHere(node);
    this.root = element("section", element("style", STYLE), element("div", this.picker, measure), this.told);
    this.root.className = "fastusp-choose";
    const options = { serialize: false, getMinHeight: () => HEIGHT, hideOnZoom: true };
    const widget = node.addDOMWidget("fastusp", "fastusp", this.root, options);
    widget.serialize = false;
    for (const own of node.widgets) this.follow(own);
    const { onConnectionsChange, onRemoved } = node;
    node.onConnectionsChange = (...args) => {
      this.soon();
      return onConnectionsChange?.apply(node, args);
    };
    node.onRemoved = (...args) => {
      choosers.delete(this);
      clearTimeout(this.timer);
      return onRemoved?.apply(node, args);
    };
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
    this.soon();
  }

  /** Looks again when a widget of the node is edited; not every edit is one of the workflow yet. */
  follow(widget) {
    const { callback } = widget;
    widget.callback = (...args) => {
      this.soon();
      return callback?.apply(widget, args);
    };
  }

  soon() {
    choosers.add(this);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), PAUSE_MS);
  }

  /** again: also where nothing was edited. */
  async ask(again = false) {
    if (!this.node.graph) return;
    const body = JSON.stringify(valuesOf(this.node));
    if (body === this.asked && !again) return;
    this.asked = body;
    try {
      const [plan, { gpus, error }] = await Promise.all([post("/fastusp/plan", body), gpusNow()]);
      if (this.asked === body) this.show(plan, gpus, error);
    } catch (error) {
      this.asked = undefined; // comes again with the next edit, or when the server is back
      this.say([], `FastUSP: ${error.message ?? error}`);
    }
  }

  show({ gpus: used, lines, problem }, gpus, error) {
    const value = valueOf(this.node, "gpus");
    const chips = [["auto", value === "auto", () => "auto"]];
    if (gpus.length > 1) chips.push(["all", value === "all", () => "all"]);
    for (const gpu of gpus) chips.push([gpuLabel(gpu), used.includes(gpu.index), () => toggled(used, gpu.index)]);
    if (!gpus.length) for (const ranks of [1, 2, 4]) chips.push([`cpu:${ranks}`, value === `cpu:${ranks}`, () => `cpu:${ranks}`]);
    const labels = chips.map(([label]) => label).join();
    if (labels !== this.labels) {
      this.buttons = chips.map(([label]) => element("button", label));
      this.picker.replaceChildren(...this.buttons);
    }
    this.labels = labels; // buttons that are the same stay in the page, and so does the keyboard's focus
    chips.forEach(([, pressed, text], at) => {
      this.buttons[at].setAttribute("aria-pressed", String(pressed));
      this.buttons[at].disabled = value === null;
      this.buttons[at].onclick = () => this.pick(text());
    });
    this.say(lines, problem ?? (/^\s*cpu/i.test(value) ? undefined : error)); // CPU ranks need no driver
  }

  pick(text) {
    keepStep(); // what was not noticed yet is a step of its own
    setValue(this.node, "gpus", text);
    keepStep();
    this.soon();
  }

  say(lines, problem) {
    const paragraphs = lines.map((line) => element("p", line));
    if (problem) {
      paragraphs.push(element("p", problem));
      paragraphs.at(-1).className = "problem";
    }
    this.told.replaceChildren(...paragraphs);
  }
}

/** The text for these GPUs and one more, or less; `auto` for none. */
function toggled(used, index) {
  const next = used.includes(index) ? used.filter((other) => other !== index) : [...used, index];
  return next.join() || "auto";
}

/** All choosers of the open workflow. Of nodes in subgraphs the front end does not say that they are gone, nor of one that
 *  was made and never added: their choosers are left here. */
function present() {
  const there = allOf(LOADER);
  for (const chooser of choosers) if (!there.includes(chooser.node)) choosers.delete(chooser);
  return [...choosers];
}

const allSoon = () => present().forEach((chooser) => chooser.soon());

app.registerExtension({
  name: "FastUSP.Choose",
  nodeCreated(node) {
    if (node.comfyClass === LOADER) new Chooser(node);
  },
  afterConfigureGraph: allSoon,
  setup() {
    api.addEventListener("graphChanged", allSoon);
    api.addEventListener("reconnected", () => {
      asked = -Infinity;
      present().forEach((chooser) => chooser.ask(true));
    });
  },
});
