// The FastUSP side panel: the worker pools of this ComfyUI, as GET /fastusp/status gives them and as the server sends
// them while a run goes on ("fastusp.pools"), and what may be done with them.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

// Between two looks at pools of which nothing is sent: workers may end without a run.
const REFRESH_MS = 4000;

const EMPTY =
  "No pool yet. Add USP Loader (Add Node > FastUSP) and connect its model to USP Sampler or KSampler. " +
  "Its worker processes start when you run the workflow; they are listed here and stay warm for the next run.";

// What Pool.status calls a pool's states, in words for people.
const STATES = {
  off: "off: starts with the next run",
  starting: "starting",
  idle: "idle: warm, waiting for a run",
  busy: "busy: a run is under way",
  stopping: "stopping: coming to the end of what was cancelled",
};

const TIMES = ["not yet", "once", "twice"];

// What Pool.status calls the whereabouts of the weights.
const HELD = {
  resident: (size) => `on the devices, at most ${size} on one`,
  parked: (size) => `parked in host memory, at most ${size} by one rank`,
  none: () => "released: loads with the next run",
};

// The actions of nodes/control.py, and in which states each makes sense.
const ACTIONS = [
  ["release", "Release memory", "Drops the weights; the workers stay warm", ["idle"]],
  ["stop", "Stop", "Ends the workers; the next run starts new ones", ["starting", "idle", "busy", "stopping"]],
  ["restart", "Restart", "Ends the workers and starts new ones", ["off", "starting", "idle", "busy", "stopping"]],
];

const STYLE = `
.fastusp { padding: 12px; color: var(--fg-color); font-size: 13px; line-height: 1.5; user-select: text; }
.fastusp h2 { margin: 0 0 12px; font-size: 15px; font-weight: 600; }
.fastusp p { margin: 0; color: var(--descrip-text); overflow-wrap: anywhere; }
.fastusp section { margin-bottom: 12px; padding: 10px; border: 1px solid var(--border-color); border-radius: 6px; }
.fastusp h3 { margin: 0; font-size: 13px; font-weight: 600; }
.fastusp progress { width: 100%; margin-top: 6px; accent-color: var(--p-primary-color, #3b82f6); }
.fastusp table { width: 100%; margin-top: 8px; border-collapse: collapse; }
.fastusp th { padding-right: 12px; font-weight: normal; text-align: left; white-space: nowrap; color: var(--descrip-text); }
.fastusp th, .fastusp td { vertical-align: top; }
.fastusp td { overflow-wrap: anywhere; white-space: pre-wrap; }
.fastusp .actions { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 8px; }
.fastusp button { padding: 2px 10px; border: 1px solid var(--border-color); border-radius: 4px; cursor: pointer;
  background: var(--comfy-input-bg); color: var(--input-text); font: inherit; }
.fastusp button:disabled { opacity: 0.5; cursor: default; }
`;

/** An element with children; strings become text nodes, so that no name from a machine is ever read as HTML. */
function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

function toast(severity, summary, detail) {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: severity === "error" ? 15000 : 4000 });
}

/** One line on what a pool does: its state, or the phase or step that a run is at. */
function said(pool) {
  const state = STATES[pool.state] ?? pool.state;
  if (pool.steps) {
    const left = pool.seconds_left >= 1 ? `, ${Math.round(pool.seconds_left)} s left` : "";
    return `step ${pool.step} of ${pool.steps}, ${pool.ms_per_step} ms a step${left}`;
  }
  if (pool.phase) return `${pool.phase} (${Math.round(pool.phase_seconds)} s)`;
  return state;
}

const gigabytes = (bytes) => (bytes / 1e9).toFixed(bytes < 1e9 ? 2 : 1);

/** What a GPU does just now, as GET /fastusp/gpus tells it; what is not told is left out. */
function load(gpu) {
  const parts = [];
  if (gpu.utilisation != null) parts.push(`${gpu.utilisation} % busy`);
  if (gpu.total) parts.push(`${gigabytes(gpu.used)} of ${gigabytes(gpu.total)} GB in use`);
  if (gpu.temperature != null) parts.push(`${gpu.temperature} °C`);
  return parts.join(", ");
}

/** A pool's facts as pairs. While it has no processes, or they have not answered yet, there is no more than its state. */
export function facts(pool, loads) {
  const rows = [["Ranks", String(pool.ranks)]];
  for (const gpu of loads.filter(({ index }) => pool.gpus.includes(index))) rows.push([`GPU ${gpu.index}`, load(gpu)]);
  if (pool.last) {
    const { steps, seconds, ms_per_step } = pool.last;
    rows.push(["Last run", `${steps} steps in ${seconds} s, ${ms_per_step} ms a step`]);
  }
  if (pool.pids) {
    pool.pids.forEach((pid, rank) => rows.push([`Rank ${rank}`, `${pool.names[rank]}, process ${pid}`]));
    if (pool.model) rows.push(["Model", pool.model]);
    if (pool.layout) rows.push(["Layout", pool.layout]);
    if (pool.held) rows.push(["Weights", HELD[pool.held](`${gigabytes(pool.nbytes)} GB`)]);
    rows.push(["Process group", pool.backend]);
    if (pool.transport) rows.push(["Exchanges", pool.transport]);
    if (pool.weights) rows.push(["Blocks", pool.weights]);
    rows.push(["PyTorch", pool.torch]);
  }
  rows.push(["Started", TIMES[pool.starts] ?? `${pool.starts} times`]);
  if (pool.error) rows.push(["Last error", pool.error]);
  return rows;
}

/** A pool's card. It stays in the page as long as the pool is there: what is in it changes, so that the keyboard's focus
 *  and a selection of text stay where they are. */
class Card {
  constructor(devices) {
    this.devices = devices;
    this.state = element("p");
    this.state.setAttribute("role", "status"); // changes are announced
    this.bar = element("progress");
    this.bar.setAttribute("aria-label", `Run on ${devices}`);
    this.table = element("table");
    this.buttons = ACTIONS.map(([action, label, tip, states]) => {
      const button = element("button", label);
      button.title = tip;
      button.onclick = () => act(action, devices, label);
      return { button, states };
    });
    const actions = element("div", ...this.buttons.map(({ button }) => button));
    actions.className = "actions";
    this.section = element("section", element("h3", devices), this.state, this.bar, this.table, actions);
    this.section.setAttribute("aria-label", `Pool on ${devices}`);
  }

  show(pool, loads) {
    const line = said(pool);
    if (this.state.textContent !== line) this.state.textContent = line;
    this.bar.hidden = !pool.steps;
    if (pool.steps) [this.bar.max, this.bar.value] = [pool.steps, pool.step];
    const rows = facts(pool, loads);
    const text = JSON.stringify(rows);
    if (text !== this.drawn)
      this.table.replaceChildren(...rows.map(([name, value]) => element("tr", element("th", name), element("td", value))));
    this.drawn = text;
    for (const { button, states } of this.buttons) button.disabled = !states.includes(pool.state);
  }
}

/** Has the server do something with a pool; whoever waits is told how it ended. */
export async function act(action, devices, label) {
  const answer = await api.fetchApi(`/fastusp/pools/${action}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ devices }),
  });
  const { error } = await answer.json();
  if (error) toast("error", `FastUSP: ${label}, ${devices}`, error);
  else toast("success", `FastUSP: ${label}, ${devices}`, "Done");
  document.dispatchEvent(new CustomEvent("fastusp.changed"));
}

export async function readPools() {
  const answer = await api.fetchApi("/fastusp/status");
  if (!answer.ok) throw new Error(`/fastusp/status answered ${answer.status}`);
  return (await answer.json()).pools;
}

/** What the GPUs do, where a pool has some: of each one that NVML names. */
async function readLoads(pools) {
  if (!pools.some((pool) => pool.gpus.length > 0)) return [];
  const answer = await api.fetchApi("/fastusp/gpus");
  return answer.ok ? (await answer.json()).gpus : [];
}

/** Shows pools in `list`, whose cards are kept by devices. */
function show(list, cards, pools, loads) {
  for (const devices of cards.keys())
    if (!pools.some((pool) => pool.devices === devices)) cards.delete(devices);
  for (const pool of pools) {
    if (!cards.has(pool.devices)) cards.set(pool.devices, new Card(pool.devices));
    cards.get(pool.devices).show(pool, loads);
  }
  const wanted = cards.size > 0 ? [...cards.values()].map((card) => card.section) : [element("p", EMPTY)];
  if (wanted.length !== list.children.length || wanted.some((node, i) => node !== list.children[i]))
    if (cards.size > 0 || list.textContent !== EMPTY) list.replaceChildren(...wanted);
}

/** Keeps `list` up to date while it is in the page. The front end does not tell a tab that another one took its place. */
async function follow(list) {
  const cards = new Map();
  let loads = [];
  let wake = () => {};
  const sent = (event) => show(list, cards, event.detail.pools, loads);
  const changed = () => wake();
  api.addEventListener("fastusp.pools", sent);
  document.addEventListener("fastusp.changed", changed);
  do {
    try {
      const pools = await readPools();
      loads = await readLoads(pools);
      show(list, cards, pools, loads);
    } catch (error) {
      cards.clear();
      list.replaceChildren(element("p", `ComfyUI does not answer (${error}). Trying again.`));
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, REFRESH_MS);
    });
  } while (list.isConnected);
  api.removeEventListener("fastusp.pools", sent);
  document.removeEventListener("fastusp.changed", changed);
}

export const tab = {
  id: "fastusp",
  icon: "pi pi-microchip",
  title: "FastUSP",
  tooltip: "FastUSP: worker pools",
  type: "custom",
  render(container) {
    const list = element("div");
    const panel = element("div", element("style", STYLE), element("h2", "FastUSP pools"), list);
    panel.className = "fastusp";
    // May run again for the same container: what was in it goes, and with it the loop that kept it up to date.
    container.replaceChildren(panel);
    follow(list);
  },
};

/** An action on every pool, for commands that people can bind keys to. */
async function onAll(action, label) {
  const states = ACTIONS.find(([name]) => name === action)[3];
  const pools = (await readPools()).filter((pool) => states.includes(pool.state));
  if (pools.length === 0) toast("info", `FastUSP: ${label}`, "There is no pool that this changes");
  for (const pool of pools) await act(action, pool.devices, label);
}

export const commands = ACTIONS.map(([action, label]) => ({
  id: `FastUSP.${action}`,
  label: `FastUSP: ${label} (all pools)`,
  icon: "pi pi-microchip",
  function: () => onAll(action, label),
}));
