// What matters of the pools and of failed runs, said once, wherever one looks.

import { api } from "../../scripts/api.js";
import { readPools, toast } from "./pools.js";
import { say, word } from "./words.js";

/** The last that was heard of each pool, by its devices. */
const heard = new Map();
/** The last error that was told: of workers that die in a run, the pool and the run tell. */
let told = "";

const firstLine = (text) => text.trim().split("\n", 1)[0];

function tellError(summary, text) {
  const line = firstLine(text);
  if (line !== told) toast("error", summary, line);
  told = line;
}

const RELEASED = word("The workers stay warm; the model loads with the next run.");

function compare(before, pool) {
  if (pool.state === "off" && pool.error && pool.error !== before.error)
    tellError(say("FastUSP: the workers on {devices} have ended", pool), pool.error);
  else if (pool.state === "off" && before.state !== "off")
    toast("info", say("FastUSP: the workers on {devices} were stopped", pool), say("The next run starts new ones."));
  else if (pool.starts > before.starts && before.starts > 0)
    toast("info", say("FastUSP: new workers on {devices}", pool), say("They load the model with the next run."));
  else if (pool.held === "none" && ["resident", "parked"].includes(before.held))
    toast("info", say("FastUSP: memory on {devices} was released", pool), say(RELEASED));
}

function hear(pools) {
  for (const pool of pools) {
    if (heard.has(pool.devices)) compare(heard.get(pool.devices), pool);
    heard.set(pool.devices, pool);
  }
}

/** ComfyUI shows a node's error under its class; what it says comes first here. */
function failed({ detail }) {
  if (detail.exception_type.startsWith("FastUSP.")) tellError(say("FastUSP: the run failed"), detail.exception_message);
}

export function followNews() {
  api.addEventListener("fastusp.pools", (event) => hear(event.detail.pools));
  api.addEventListener("execution_error", failed);
  api.addEventListener("execution_start", () => void (told = ""));
  readPools().then(hear, (error) => console.warn("FastUSP: the pools were not read:", error));
}
