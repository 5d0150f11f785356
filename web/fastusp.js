// The FastUSP side panel: the worker pools of this ComfyUI, as GET /fastusp/status gives them. And the status lines on
// nodes, which a page that is loaded in the middle of a run has not heard.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const REFRESH_MS = 2000;

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

const STYLE = `
.fastusp { padding: 12px; color: var(--fg-color); font-size: 13px; line-height: 1.5; user-select: text; }
.fastusp h2 { margin: 0 0 12px; font-size: 15px; font-weight: 600; }
.fastusp p { margin: 0; color: var(--descrip-text); }
.fastusp section { margin-bottom: 12px; padding: 10px; border: 1px solid var(--border-color); border-radius: 6px; }
.fastusp h3 { margin: 0; font-size: 13px; font-weight: 600; }
.fastusp table { width: 100%; margin-top: 8px; border-collapse: collapse; }
.fastusp th { padding-right: 12px; font-weight: normal; text-align: left; white-space: nowrap; color: var(--descrip-text); }
.fastusp th, .fastusp td { vertical-align: top; }
.fastusp td { overflow-wrap: anywhere; white-space: pre-wrap; }
`;

/** An element with children; strings become text nodes, so that no name from a machine is ever read as HTML. */
function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

/** One pool. While it has no processes, or they have not answered yet, there is no more to tell than its state. */
function poolView(pool) {
  const rows = [["Ranks", String(pool.ranks)]];
  if (pool.pids) {
    pool.pids.forEach((pid, rank) => rows.push([`Rank ${rank}`, `${pool.names[rank]}, process ${pid}`]));
    if (pool.model) rows.push(["Model", pool.model]);
    if (pool.layout) rows.push(["Layout", pool.layout]);
    if (pool.held) rows.push(["Weights", HELD[pool.held](`${(pool.nbytes / 1e9).toFixed(1)} GB`)]);
    rows.push(["Process group", pool.backend]);
    if (pool.transport) rows.push(["Exchanges", pool.transport]);
    if (pool.weights) rows.push(["Weights", pool.weights]);
    rows.push(["PyTorch", pool.torch]);
  }
  rows.push(["Started", TIMES[pool.starts] ?? `${pool.starts} times`]);
  if (pool.error) rows.push(["Last error", pool.error]);
  return element(
    "section",
    element("h3", pool.devices),
    element("p", STATES[pool.state] ?? pool.state),
    element("table", ...rows.map(([name, value]) => element("tr", element("th", name), element("td", value)))),
  );
}

async function readStatus() {
  const answer = await api.fetchApi("/fastusp/status");
  if (!answer.ok) throw new Error(`/fastusp/status answered ${answer.status}`);
  return answer.text();
}

function statusViews(text) {
  const views = JSON.parse(text).pools.map(poolView);
  return views.length > 0 ? views : [element("p", EMPTY)];
}

/** Keeps `list` up to date while it is in the page. The front end does not tell a tab that another one took its place. */
async function follow(list) {
  let drawn;
  do {
    let text, views;
    try {
      text = await readStatus();
      views = statusViews(text);
    } catch (error) {
      text = String(error);
      views = [element("p", `ComfyUI does not answer (${text}). Trying again.`)];
    }
    // Redrawing the same would lose the user's text selection.
    if (text !== drawn) list.replaceChildren(...views);
    drawn = text;
    await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
  } while (list.isConnected);
}

const tab = {
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

// The id of graphs that have none; they get one when the page is loaded anew.
const NO_ID = "00000000-0000-0000-0000-000000000000";

/** Shows again what the nodes of this page's running prompt say, unless another workflow has taken their place. */
async function showTexts() {
  const client = api.clientId ?? api.initialClientId;
  if (!client) return;
  const answer = await api.fetchApi(`/fastusp/texts?client=${encodeURIComponent(client)}`);
  if (!answer.ok) throw new Error(`/fastusp/texts answered ${answer.status}`);
  const { workflow, texts } = await answer.json();
  if (![null, NO_ID, (app.rootGraph ?? app.graph).id].includes(workflow)) return;
  for (const [nodeId, text] of Object.entries(texts))
    api.dispatchEvent(new CustomEvent("progress_text", { detail: { nodeId, text } }));
}

/** Nobody waits for it; where the server is away, it comes again. */
function showTextsSoon() {
  showTexts().catch((error) => console.warn("FastUSP: the nodes' texts were not read:", error));
}

app.registerExtension({
  name: "FastUSP.Pools",
  afterConfigureGraph: showTextsSoon,
  setup() {
    // Older front ends have no side bar; the nodes do not need it.
    app.extensionManager?.registerSidebarTab?.(tab);
    api.addEventListener("reconnected", showTextsSoon);
  },
});
