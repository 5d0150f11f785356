// The FastUSP side panel: the worker pools of this ComfyUI, as GET /fastusp/status gives them and as the server sends
// them while a run goes on ("fastusp.pools"), and what may be done with them.

import { api } from "../../scripts/api.js";
import { ACTIONS, Card } from "./card.js";
import { element } from "./element.js";
import { act, copyReport, readLoads, readPools, toast } from "./pools.js";
import { say, word } from "./words.js";

// Between two looks at pools of which nothing is sent: workers may end without a run.
const REFRESH_MS = 4000;
// The same while the seconds of a phase are shown.
const SECOND_MS = 1000;

const EMPTY = word(
  "No pool yet. Add USP Loader (Add Node > FastUSP) and connect its model to USP Sampler or KSampler. " +
    "Its worker processes start when you run the workflow; they are listed here and stay warm for the next run.",
);

const STYLE = `
.fastusp { padding: 12px; container-type: inline-size; color: var(--fg-color); font-size: 13px; line-height: 1.5; user-select: text; }
.fastusp h2 { margin: 0 0 12px; font-size: 15px; font-weight: 600; }
.fastusp p { margin: 0; color: var(--descrip-text); overflow-wrap: anywhere; }
.fastusp section { margin-bottom: 12px; padding: 10px; border: 1px solid var(--border-color); border-radius: 6px; }
.fastusp h3 { margin: 0; font-size: 13px; font-weight: 600; }
.fastusp h4 { margin: 8px 0 0; font-size: 13px; font-weight: 600; }
.fastusp ol { margin: 0; padding: 0; list-style: none; overflow-wrap: anywhere; }
.fastusp small { display: block; color: var(--descrip-text); }
.fastusp pre { max-height: 200px; margin: 4px 0 0; padding: 6px; overflow: auto; font-size: 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; border-left: 3px solid var(--error-text, #d33); background: var(--comfy-input-bg); }
.fastusp .spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.fastusp progress { width: 100%; margin-top: 6px; accent-color: var(--p-primary-color, #3b82f6); }
.fastusp table { width: 100%; margin-top: 8px; border-collapse: collapse; }
.fastusp th { padding-right: 12px; font-weight: normal; text-align: left; white-space: nowrap; color: var(--descrip-text); }
.fastusp th, .fastusp td { vertical-align: top; }
.fastusp td { overflow-wrap: anywhere; white-space: pre-wrap; }
@container (max-width: 240px) { .fastusp tr, .fastusp th, .fastusp td { display: block; } }
.fastusp .memory { display: flex; height: 8px; margin: 2px 0 6px; border: 1px solid var(--border-color); }
.fastusp .memory span { flex-basis: 0; }
.fastusp .weights { background: var(--p-primary-color, #3b82f6); }
.fastusp .buffers { background: color-mix(in srgb, var(--p-primary-color, #3b82f6) 50%, transparent); }
.fastusp .other { background: var(--descrip-text); }
.fastusp .actions { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 8px; }
.fastusp button { padding: 2px 10px; border: 1px solid var(--border-color); border-radius: 4px; cursor: pointer;
  background: var(--comfy-input-bg); color: var(--input-text); font: inherit; }
.fastusp button:focus-visible, .fastusp pre:focus-visible { outline: 2px solid var(--p-primary-color, #3b82f6); }
.fastusp button:disabled { opacity: 0.5; cursor: default; }
`;

/** Shows pools in `list`, whose cards are kept by devices. */
function show(list, cards, pools, loads) {
  for (const devices of cards.keys())
    if (!pools.some((pool) => pool.devices === devices)) cards.delete(devices);
  for (const pool of pools) {
    if (!cards.has(pool.devices)) cards.set(pool.devices, new Card(pool.devices));
    cards.get(pool.devices).show(pool, loads, pools);
  }
  const wanted = cards.size > 0 ? [...cards.values()].map((card) => card.section) : [element("p", say(EMPTY))];
  if (wanted.length !== list.children.length || wanted.some((node, i) => node !== list.children[i]))
    if (cards.size > 0 || list.textContent !== say(EMPTY)) list.replaceChildren(...wanted);
}

/** Keeps `list` up to date while it is in the page. The front end does not tell a tab that another one took its place. */
async function follow(list) {
  const cards = new Map();
  let loads = [];
  let counting = false;
  let wake = () => {};
  const sent = (event) => show(list, cards, event.detail.pools, loads);
  const changed = () => wake();
  api.addEventListener("fastusp.pools", sent);
  document.addEventListener("fastusp.changed", changed);
  do {
    try {
      const pools = await readPools();
      loads = await readLoads(pools);
      counting = pools.some(({ phase, steps }) => phase && !steps);
      show(list, cards, pools, loads);
    } catch (error) {
      cards.clear();
      list.replaceChildren(element("p", say("ComfyUI does not answer ({error}). Trying again.", { error })));
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, counting ? SECOND_MS : REFRESH_MS);
    });
  } while (list.isConnected);
  api.removeEventListener("fastusp.pools", sent);
  document.removeEventListener("fastusp.changed", changed);
}

export const tab = {
  id: "fastusp",
  icon: "pi pi-microchip",
  title: "FastUSP",
  get tooltip() {
    return say("FastUSP: worker pools");
  },
  type: "custom",
  render(container) {
    const list = element("div");
    const panel = element("div", element("style", STYLE), element("h2", say("FastUSP pools")), list);
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
  if (pools.length === 0) toast("info", `FastUSP: ${say(label)}`, say("There is no pool that this changes"));
  for (const pool of pools) await act(action, pool.devices, say(label));
}

/** The report on the pool that failed last, else on the first. */
async function report() {
  const pools = await readPools();
  const pool = pools.find(({ error }) => error) ?? pools[0];
  if (pool) await copyReport(pool.devices);
  else toast("info", say("FastUSP: no report"), say(EMPTY));
}

const icon = "pi pi-microchip";

export const commands = [
  ...ACTIONS.map(([action, label]) => {
    return { id: `FastUSP.${action}`, label: `FastUSP: ${label} (all pools)`, icon, function: () => onAll(action, label) };
  }),
  { id: "FastUSP.report", label: "FastUSP: Copy report", icon, function: report },
];
