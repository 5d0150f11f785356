// A pool's card in the side panel.

import { button, classed, element } from "./element.js";
import { act, copyReport, interrupt } from "./pools.js";
import { showLog } from "./log.js";
import { say, size, word } from "./words.js";

// What Pool.status calls a pool's states, in words for people.
const STATES = {
  off: word("off: starts with the next run"),
  starting: word("starting"),
  idle: word("idle: warm, waiting for a run"),
  busy: word("busy: a run is under way"),
  stopping: word("stopping: coming to the end of what was cancelled"),
};

const TIMES = [word("not yet"), word("once"), word("twice"), word("{starts} times")];

// What Pool.status calls the whereabouts of the weights.
const HELD = {
  resident: word("on the devices, at most {size} on one"),
  parked: word("parked in host memory, at most {size} by one rank"),
  none: word("released: loads with the next run"),
};

// The actions of nodes/control.py, and in which states each makes sense.
export const ACTIONS = [
  ["release", word("Release memory"), word("Drops the weights; the workers stay warm"), ["idle"]],
  ["stop", word("Stop"), word("Ends the workers; the next run starts new ones"), ["starting", "idle", "busy", "stopping"]],
  ["restart", word("Restart"), word("Ends the workers and starts new ones"), ["off", "starting", "idle", "busy", "stopping"]],
];

/** One line on what a pool does: its state, or the phase or step that a run is at. */
function said(pool) {
  if (pool.steps) {
    const parts = [say("step {step} of {steps}", pool)];
    if (pool.ms_per_step) parts.push(say("{ms_per_step} ms a step", pool));
    if (pool.seconds_left >= 1) parts.push(say("{seconds} s left", { seconds: Math.round(pool.seconds_left) }));
    return parts.join(", ");
  }
  if (pool.phase) return `${pool.phase} (${Math.round(pool.phase_seconds)} s)`;
  return stateOf(pool);
}

const stateOf = ({ state }) => (state in STATES ? say(STATES[state]) : state);

/** What is read aloud of it: no seconds, and no single steps. */
const announced = (pool) => `${pool.devices}: ${pool.phase ?? stateOf(pool)}`;

/** What a GPU does just now, as GET /fastusp/gpus tells it; what is not told is left out. */
function load(gpu) {
  const parts = [];
  if (gpu.utilisation != null) parts.push(say("{utilisation} % busy", gpu));
  if (gpu.total) parts.push(say("{used} of {total} in use", { used: size(gpu.used), total: size(gpu.total) }));
  if (gpu.temperature != null) parts.push(`${gpu.temperature} °C`);
  return parts.join(", ");
}

/** What the parts of a GPU's memory are called. */
const PARTS = { weights: word("weights"), buffers: word("buffers"), other: word("other"), free: word("free") };

/** What a GPU's memory is used for, by its rank, in bytes. */
function shares({ weights, own, free, total }) {
  return { weights, buffers: Math.max(0, own - weights), other: Math.max(0, total - free - own), free };
}

/** A rank's device and process, what of the device's memory is used for what, and that as shares for a bar. */
function rankRow(pool, rank) {
  const name = say("Rank {rank}", { rank });
  const who = say("{name}, process {pid}", { name: pool.names[rank], pid: pool.pids[rank] });
  const shown = pool.memory[rank];
  if (!shown) return [name, who];
  if (pool.gpus.length === 0) return [name, `${who}\n${say("{size} of memory", { size: size(shown.own) })}`];
  const parts = shares(shown);
  const text = Object.entries(parts).map(([part, bytes]) => `${say(PARTS[part])} ${size(bytes)}`).join(", ");
  return [name, `${who}\n${text}`, parts];
}

/** A bar for the eye alone: what it says is in words beside it. */
function bar(parts) {
  const pieces = Object.entries(parts).map(([name, bytes]) => {
    const piece = classed(name, element("span"));
    piece.style.flexGrow = bytes;
    return piece;
  });
  const made = classed("memory", element("div", ...pieces));
  made.setAttribute("aria-hidden", "true");
  return made;
}

/** How much faster a run was than the same on one rank, with the same sampler, types and options of 8 bits, in words;
 *  none where that was not measured here. A run of which steps may have been skipped has no time of a step, and is not compared. */
function speed(run, pool, pools) {
  if (pool.ranks < 2 || !run.ms_per_step) return [];
  const same = ["model", "storage", "width", "height", "images", "sampler", "cfg", "eight_bits"];
  for (const one of pools.filter(({ ranks, gpus }) => ranks === 1 && gpus.length > 0 === pool.gpus.length > 0)) {
    const found = one.history.find((other) => other.ms_per_step && same.every((name) => other[name] === run[name]));
    const times = found && (found.ms_per_step / run.ms_per_step).toFixed(2);
    if (found) return [say("{times} times as fast as on {devices}", { times, devices: one.devices })];
  }
  return [];
}

/** A run that ended well, in two lines: what it was, and where its time went, if not all into sampling. */
export function runLines(run, pool, pools) {
  const clock = new Date(run.ended * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const images = run.images > 1 ? `, ${say("{images} images", run)}` : "";
  const what = [`${clock} ${run.width} x ${run.height}${images}: ${say("{steps} steps in {seconds} s", run)}`];
  if (run.ms_per_step) what.push(say("{ms_per_step} ms a step", run));
  if (run.evaluations) what.push(say("{skipped} of {evaluations} evaluations skipped", run));
  what.push(...speed(run, pool, pools));
  const phases = Object.entries(run.phases).filter(([, seconds]) => seconds >= 0.1);
  const elsewhere = phases.some(([phase]) => phase !== "sampling");
  return [what.join(", "), elsewhere ? phases.map(([phase, seconds]) => `${phase} ${seconds} s`).join(", ") : ""];
}

/** A pool's facts: names, words, and shares where there is a bar for them. While it has no processes, or they have not answered yet, there is no more than its state. */
function facts(pool, loads) {
  const rows = [[say("Ranks"), String(pool.ranks)]];
  for (const gpu of loads.filter(({ index }) => pool.gpus.includes(index))) rows.push([`GPU ${gpu.index}`, load(gpu)]);
  if (pool.pids) {
    pool.pids.forEach((_, rank) => rows.push(rankRow(pool, rank)));
    if (pool.model) rows.push([say("Model"), pool.model]);
    if (pool.layout) rows.push([say("Layout"), pool.layout]);
    if (pool.options) rows.push([say("Options"), pool.options]);
    if (pool.held) rows.push([say("Weights"), say(HELD[pool.held], { size: size(pool.nbytes) })]);
    rows.push([say("Process group"), pool.backend]);
    if (pool.transport) rows.push([say("Exchanges"), pool.transport]);
    if (pool.weights) rows.push([say("Blocks"), pool.weights]);
    rows.push(["PyTorch", pool.torch]);
  }
  rows.push([say("Started"), say(TIMES[Math.min(pool.starts, 3)], pool)]);
  return rows;
}

/** Has an element show `value`, drawn by `draw`, unless it does: what is selected or focused stays so. */
function redraw(node, value, draw) {
  const text = JSON.stringify(value);
  if (node.dataset.drawn !== text) node.replaceChildren(...draw());
  node.dataset.drawn = text;
}

const REPORT = word("Versions, layout, options, the last error and log lines, for a bug report; no paths, no prompts");

/** It stays in the page as long as the pool is there: what is in it changes, so that the keyboard's focus and a selection
 *  of text stay where they are. */
export class Card {
  constructor(devices) {
    this.state = element("p");
    this.line = classed("line", element("small"));
    this.spoken = classed("spoken", element("p"));
    this.spoken.setAttribute("role", "status");
    this.bar = element("progress");
    this.bar.setAttribute("aria-label", say("Run on {devices}", { devices }));
    this.error = element("pre");
    this.error.tabIndex = 0; // it scrolls
    this.failure = element("div", element("h4", say("Last error")), this.error);
    this.failure.setAttribute("role", "group");
    this.failure.setAttribute("aria-label", say("Last error on {devices}", { devices }));
    this.table = element("table");
    this.runs = element("ol");
    this.history = element("div", element("h4", say("Last runs")), this.runs);
    const stops = say("Ends the run as ComfyUI's own button does: after the step that it is at; the workers stay warm");
    this.buttons = [
      { button: button(say("Interrupt"), stops, interrupt), states: ["busy"] },
      ...ACTIONS.map(([action, label, tip, states]) => {
        return { button: button(say(label), say(tip), () => act(action, devices, say(label))), states };
      }),
    ];
    const more = [
      button(say("Show log"), say("What the workers write, as they write it"), () => showLog(devices)),
      button(say("Copy report"), say(REPORT), () => copyReport(devices)),
    ];
    const actions = classed("actions", element("div", ...this.buttons.map(({ button }) => button), ...more));
    // What one does comes before what one reads, which may be long.
    const parts = [this.state, this.line, this.spoken, this.bar, actions, this.failure, this.history, this.table];
    this.section = element("section", element("h3", devices), ...parts);
    this.section.setAttribute("aria-label", say("Pool on {devices}", { devices }));
  }

  show(pool, loads, pools) {
    for (const [node, line] of [[this.state, said(pool)], [this.line, pool.last_line ?? ""], [this.spoken, announced(pool)]])
      if (node.textContent !== line) node.textContent = line;
    this.bar.hidden = !pool.steps;
    if (pool.steps) [this.bar.max, this.bar.value] = [pool.steps, pool.step];
    this.failure.hidden = !pool.error;
    if (this.error.textContent !== (pool.error ?? "")) this.error.textContent = pool.error ?? "";
    this.history.hidden = pool.history.length === 0;
    const runs = pool.history.map((run) => runLines(run, pool, pools));
    redraw(this.runs, runs, () => runs.map(([what, phases]) => element("li", what, element("small", phases))));
    const rows = facts(pool, loads);
    const cells = ([name, value, parts]) => {
      return element("tr", element("th", name), element("td", value, ...(parts ? [bar(parts)] : [])));
    };
    redraw(this.table, rows, () => rows.map(cells));
    for (const { button, states } of this.buttons) button.disabled = !states.includes(pool.state);
  }
}
