// What matters of the pools and of failed runs, said once, wherever one looks.

import { api } from "../../scripts/api.js";
import { readPools, toast } from "./pools.js";

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

function compare(before, pool) {
  const where = pool.devices;
  if (pool.state === "off" && pool.error && pool.error !== before.error)
    tellError(`FastUSP: the workers on ${where} have ended`, pool.error);
  else if (pool.state === "off" && before.state !== "off")
    toast("info", `FastUSP: the workers on ${where} were stopped`, "The next run starts new ones.");
  else if (pool.starts > before.starts && before.starts > 0)
    toast("info", `FastUSP: new workers on ${where}`, "They load the model with the next run.");
  else if (pool.held === "none" && ["resident", "parked"].includes(before.held))
    toast("info", `FastUSP: memory on ${where} was released`, "The workers stay warm; the model loads with the next run.");
}

function hear(pools) {
  for (const pool of pools) {
    if (heard.has(pool.devices)) compare(heard.get(pool.devices), pool);
    heard.set(pool.devices, pool);
  }
}

/** ComfyUI shows a node's error under its class; what it says comes first here. */
function failed({ detail }) {
  if (detail.exception_type.startsWith("FastUSP.")) tellError("FastUSP: the run failed", detail.exception_message);
}

export function followNews() {
  api.addEventListener("fastusp.pools", (event) => hear(event.detail.pools));
  api.addEventListener("execution_error", failed);
  api.addEventListener("execution_start", () => void (told = ""));
  readPools().then(hear, (error) => console.warn("FastUSP: the pools were not read:", error));
}
