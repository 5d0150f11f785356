// The FastUSP side panel: the worker pools of this ComfyUI, as GET /fastusp/status gives them once and as the server sends
// them from then on ("fastusp.pools"), what their GPUs do ("fastusp.loads"), and what may be done with them.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ACTIONS, Card } from "./card.js";
import { button, classed, element } from "./element.js";
import { act, copyReport, interrupt, readPools, toast } from "./pools.js";
import { watch } from "./watch.js";
import { say, word } from "./words.js";

// In which the seconds of a phase are counted.
const SECOND_MS = 1000;

const AWAY = word("ComfyUI does not answer. The pools are here again when it does.");
const REFUSED = word("ComfyUI does not answer ({error}). The pools are here again when it does.");
// How soon it is asked again after it did not answer.
const AGAIN_MS = 4000;

const EMPTY = word(
  "No pool yet. Worker processes start when a workflow with USP Loader runs; they are listed here and stay warm for the next run.",
);
const WAYS = word(
  "Have the open workflow use them, or open one that does: under FastUSP in ComfyUI's templates, where FastUSP demo shapes needs no download.",
);

const STYLE = `
.fastusp { padding: 12px; container-type: inline-size; color: var(--fg-color); font-size: 13px; line-height: 1.5; user-select: text; }
.fastusp h2 { margin: 0 0 12px; font-size: 15px; font-weight: 600; }
.fastusp p { margin: 0; color: var(--descrip-text); overflow-wrap: anywhere; }
.fastusp p + p { margin-top: 8px; }
.fastusp section { margin-bottom: 12px; padding: 10px; border: 1px solid var(--border-color); border-radius: 6px; }
.fastusp h3 { margin: 0; font-size: 13px; font-weight: 600; }
.fastusp h4 { margin: 8px 0 0; font-size: 13px; font-weight: 600; }
.fastusp ol { margin: 0; padding: 0; list-style: none; overflow-wrap: anywhere; }
.fastusp li + li { margin-top: 4px; }
.fastusp small { display: block; color: var(--descrip-text); }
.fastusp .line { max-height: 4.5em; overflow: hidden; overflow-wrap: anywhere; }
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

/** What there is without any pool: how to come to one. */
function noPools() {
  const ways = [
    [word("Use FastUSP here"), "FastUSP.UseHere"],
    [word("Open templates"), "Comfy.BrowseTemplates"],
  ].map(([label, command]) => button(say(label), "", () => app.extensionManager.command.execute(command)));
  return element("div", element("p", say(EMPTY)), element("p", say(WAYS)), classed("actions", element("div", ...ways)));
}

/** Shows pools in `list`, whose cards are kept by devices. empty: what is shown where there are none. */
function show(list, cards, pools, loads, empty) {
  for (const devices of cards.keys())
    if (!pools.some((pool) => pool.devices === devices)) cards.delete(devices);
  for (const pool of pools) {
    if (!cards.has(pool.devices)) cards.set(pool.devices, new Card(pool.devices));
    cards.get(pool.devices).show(pool, loads, pools);
  }
  const wanted = cards.size > 0 ? [...cards.values()].map((card) => card.section) : [empty];
  if (wanted.length !== list.children.length || wanted.some((node, i) => node !== list.children[i]))
    list.replaceChildren(...wanted);
}

/** How many panels are in the page: one that is drawn anew is there before the other one is gone. */
let open = 0;

/** Keeps `list` up to date while it is in the page. The front end does not tell a tab that another one took its place. */
function follow(list) {
  const [cards, empty] = [new Map(), noPools()];
  let [pools, loads, since] = [[], [], 0];
  const draw = () => {
    const seconds = (performance.now() - since) / 1000;
    const counted = pools.map((pool) => (pool.phase ? { ...pool, phase_seconds: pool.phase_seconds + seconds } : pool));
    show(list, cards, counted, loads, empty);
  };
  const take = (told) => {
    [pools, since] = [told, performance.now()];
    draw();
  };
  const away = (why) => {
    cards.clear();
    pools = [];
    list.replaceChildren(element("p", why));
  };
  const ask = () => {
    const asked = performance.now();
    readPools().then(
      (told) => asked > since && take(told), // else newer ones were sent meanwhile
      ({ message }) => {
        away(say(REFUSED, { error: message }));
        setTimeout(() => list.isConnected && asked > since && ask(), AGAIN_MS);
      },
    );
  };
  const heard = {
    "fastusp.pools": ({ detail }) => take(detail.pools),
    "fastusp.loads": ({ detail }) => ((loads = detail.gpus), draw()),
    reconnecting: () => away(say(AWAY)),
    reconnected: ask,
  };
  for (const [type, listener] of Object.entries(heard)) api.addEventListener(type, listener);
  ask();
  watch({ panel: ++open > 0 });
  const clock = setInterval(() => {
    if (list.isConnected) return pools.some(({ phase, steps }) => phase && !steps) && draw();
    clearInterval(clock);
    for (const [type, listener] of Object.entries(heard)) api.removeEventListener(type, listener);
    watch({ panel: --open > 0 });
  }, SECOND_MS);
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
  else toast("info", say("FastUSP: no report"), say("No pool yet: its workers start when a workflow with USP Loader runs."));
}

const icon = "pi pi-microchip";

export const commands = [
  { id: "FastUSP.interrupt", label: "FastUSP: Interrupt", icon, function: interrupt },
  ...ACTIONS.map(([action, label]) => {
    return { id: `FastUSP.${action}`, label: `FastUSP: ${label} (all pools)`, icon, function: () => onAll(action, label) };
  }),
  { id: "FastUSP.report", label: "FastUSP: Copy report", icon, function: report },
];
