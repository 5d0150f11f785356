// A tab of ComfyUI's bottom panel: what a pool's workers write, as GET /fastusp/pools/log gives it, while it is open.

import { app } from "../../scripts/app.js";
import { element } from "./element.js";
import { copy, readLog, readPools } from "./pools.js";
import { say } from "./words.js";

const ID = "fastusp-log";
const REFRESH_MS = 1000;
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
    this.shown = null;
    this.clear();
  }

  choose(devices) {
    chosen = devices;
    this.wake?.();
  }

  clear() {
    [this.written, this.next] = [[], 0];
    this.lines.replaceChildren();
  }

  /** Follows what is written until the tab is closed. */
  async follow() {
    const changed = () => this.wake?.(); // none yet in the first look
    document.addEventListener("fastusp.log", changed);
    do {
      try {
        await this.look();
      } catch (error) {
        this.clear();
        this.lines.append(say("ComfyUI does not answer ({error}). Trying again.", { error: error.message }));
      }
      await new Promise((resolve) => {
        this.wake = resolve;
        setTimeout(resolve, REFRESH_MS);
      });
    } while (this.root.isConnected);
    document.removeEventListener("fastusp.log", changed);
  }

  async look() {
    const known = (await readPools()).map((pool) => pool.devices);
    if (!known.includes(chosen)) chosen = known[0] ?? null;
    if ([...this.pools.options].map((option) => option.value).join() !== known.join())
      this.pools.replaceChildren(...known.map((devices) => element("option", devices)));
    if (this.pools.value !== chosen) this.pools.value = chosen;
    if (this.shown !== chosen) this.clear();
    this.shown = chosen;
    if (chosen === null) {
      if (!this.lines.textContent) this.lines.append(say("No pool yet: its workers start when a workflow with USP Loader runs."));
      return;
    }
    const { lines, next } = await readLog(chosen, this.next);
    if (this.shown !== chosen) return; // another one was chosen meanwhile
    if (next < this.next) this.clear(); // ComfyUI was started anew
    if (this.next === 0) this.lines.replaceChildren();
    this.add(lines);
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
  render: (container) => void new Reader(container).follow(),
};

/** Opens the tab, with the log of one pool. */
export function showLog(devices) {
  chosen = devices ?? chosen;
  document.dispatchEvent(new CustomEvent("fastusp.log"));
  const panel = app.extensionManager.bottomPanel;
  if (!panel.bottomPanelVisible || panel.activeBottomPanelTabId !== ID) panel.toggleBottomPanelTab(ID);
}

export const logCommand = {
  id: "FastUSP.log",
  label: "FastUSP: Show worker log",
  icon: "pi pi-microchip",
  function: () => showLog(),
};
