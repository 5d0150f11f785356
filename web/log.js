// A tab of ComfyUI's bottom panel: what a pool's workers write, as the server sends it while the tab is open.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { element } from "./element.js";
import { copy, readPools } from "./pools.js";
import { watch } from "./watch.js";
import { say } from "./words.js";

const ID = "fastusp-log";
/** How soon it is noticed that the tab was closed. */
const CLOSED_MS = 1000;
/** As many lines as the server keeps. */
const LINES = 2000;

const STYLE = `
.fastusp-log { display: flex; flex-direction: column; height: 100%; padding: 4px 12px; gap: 4px; box-sizing: border-box;
  color: var(--fg-color); font-size: 13px; }
.fastusp-log .tools { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.fastusp-log pre { flex: 1; min-height: 0; margin: 0; padding: 4px; overflow: auto; user-select: text; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 12px; border: 1px solid var(--border-color); background: var(--comfy-input-bg); }
.fastusp-log select, .fastusp-log button { padding: 2px 10px; border: 1px solid var(--border-color); border-radius: 4px;
  background: var(--comfy-input-bg); color: var(--input-text); font: inherit; }
.fastusp-log :focus-visible { outline: 2px solid var(--p-primary-color, #3b82f6); }
`;

/** The devices of the pool whose log is shown; none before there is a pool. */
let chosen = null;
/** The tab's content, the last that was drawn. */
let current;

class Reader {
  constructor(container) {
    this.pools = element("select");
    this.pools.setAttribute("aria-label", say("Pool"));
    this.pools.onchange = () => this.choose(this.pools.value);
    this.lines = element("pre");
    this.lines.tabIndex = 0;
    this.lines.setAttribute("role", "log");
    this.lines.setAttribute("aria-label", say("What the workers write"));
    const copied = element("button", say("Copy"));
    copied.type = "button";
    copied.onclick = () => copy(this.written.join("\n"), say("FastUSP: log copied"));
    const tools = element("div", element("span", say("Pool")), this.pools, copied);
    tools.className = "tools";
    this.root = element("div", element("style", STYLE), tools, this.lines);
    this.root.className = "fastusp-log";
    container.style.height = "100%"; // or the tab would be as high as the log, and its end cut off
    container.replaceChildren(this.root);
    this.clear();
  }

  /** Follows what is written until the tab is closed. The front end does not tell when that is. */
  follow() {
    current = this;
    const heard = {
      "fastusp.pools": ({ detail }) => this.offer(detail.pools),
      "fastusp.log": ({ detail }) => this.hear(detail),
      reconnected: () => this.ask(),
    };
    for (const [type, listener] of Object.entries(heard)) api.addEventListener(type, listener);
    this.ask();
    const clock = setInterval(() => {
      if (this.root.isConnected) return;
      clearInterval(clock);
      for (const [type, listener] of Object.entries(heard)) api.removeEventListener(type, listener);
      if (current === this) watch({ log: (current = null) });
    }, CLOSED_MS);
  }

  ask() {
    readPools().then((pools) => this.offer(pools), (error) => {
      this.clear();
      this.shown = undefined; // what is offered next is chosen anew
      this.lines.append(say("ComfyUI does not answer ({error}). The log is here again when it does.", { error: error.message }));
    });
  }

  /** Has the pools that are there to be chosen from. */
  offer(pools) {
    const known = pools.map(({ devices }) => devices);
    if ([...this.pools.options].map((option) => option.value).join() !== known.join())
      this.pools.replaceChildren(...known.map((devices) => element("option", devices)));
    const wanted = known.includes(chosen) ? chosen : (known[0] ?? null);
    if (wanted !== this.shown) this.choose(wanted);
    else if (this.pools.value !== wanted) this.pools.value = wanted;
  }

  choose(devices) {
    this.shown = chosen = this.pools.value = devices;
    this.clear();
    if (devices === null) this.lines.append(say("No pool yet: its workers start when a workflow with USP Loader runs."));
    watch({ log: devices === null ? null : this });
  }

  clear() {
    [this.written, this.next] = [[], 0];
    this.lines.replaceChildren();
  }

  /** What the server is asked for: this pool's lines from here on. */
  toJSON() {
    return { devices: this.shown, from: this.next };
  }

  /** As nodes/watching.py sends it. */
  hear({ devices, asked, from, next, lines }) {
    if (devices !== this.shown || asked > this.next) return; // for what was shown before another choice
    if (next < this.next || this.next === 0) this.clear(); // ComfyUI was started anew; what was said in place of lines
    this.add(lines.slice(Math.max(0, this.next - from)));
    this.next = next;
  }

  add(lines) {
    if (lines.length === 0) return;
    const { scrollTop, clientHeight, scrollHeight } = this.lines;
    const atTheEnd = scrollTop + clientHeight >= scrollHeight - 8; // who has scrolled back reads there
    this.written = [...this.written, ...lines].slice(-LINES);
    this.lines.append(lines.join("\n") + "\n");
    if (this.lines.childNodes.length > 100) this.lines.replaceChildren(this.written.join("\n") + "\n");
    if (atTheEnd) this.lines.scrollTop = this.lines.scrollHeight;
  }
}

export const logTab = {
  id: ID,
  get title() {
    return say("FastUSP log"); // when it is drawn: the words are not there yet
  },
  type: "custom",
  render: (container) => new Reader(container).follow(),
};

/** Opens the tab, with the log of one pool. */
export function showLog(devices) {
  if (devices && current) current.choose(devices);
  chosen = devices ?? chosen;
  const panel = app.extensionManager.bottomPanel;
  if (!panel.bottomPanelVisible || panel.activeBottomPanelTabId !== ID) panel.toggleBottomPanelTab(ID);
}

export const logCommand = {
  id: "FastUSP.log",
  label: "FastUSP: Show worker log",
  icon: "pi pi-microchip",
  function: () => showLog(),
};
