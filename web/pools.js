// What the page asks the server about the worker pools and GPUs, and has it do with them; and small things that the
// panel and the log share.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { element } from "./element.js";
import { say } from "./words.js";

export function toast(severity, summary, detail) {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: severity === "error" ? 15000 : 4000 });
}

/** What a route answers. Raises Error where it refuses, with its own words. */
async function read(route, options) {
  const answer = await api.fetchApi(route, options);
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error ?? say("{route} answered {status}", { route, status: answer.status }));
  return told;
}

/** Posts JSON, as `read`. body: the text. */
export const post = (route, body) => read(route, { method: "POST", headers: { "Content-Type": "application/json" }, body });

/** What the GPUs do: gpus, those that NVML names, and error, why it names none. */
export const readGpus = () => read("/fastusp/gpus");

const named = (devices) => `devices=${encodeURIComponent(devices)}`;

export const readPools = async () => (await read("/fastusp/status")).pools;
const readReport = async (devices) => (await read(`/fastusp/pools/report?${named(devices)}`)).report;

/** Has the server do something with a pool. How it ends is told by toasts.js, but for a refusal. */
export async function act(action, devices, label) {
  try {
    await post(`/fastusp/pools/${action}`, JSON.stringify({ devices }));
  } catch (error) {
    toast("error", `FastUSP: ${label}, ${devices}`, error.message);
  }
}

/** As ComfyUI's own button does. */
export const interrupt = () => api.fetchApi("/interrupt", { method: "POST" });

/** Puts a text on the clipboard, and says `done`. Browsers offer theirs to pages of the same machine and of https alone. */
export async function copy(text, done) {
  let copied = false;
  if (navigator.clipboard) copied = await navigator.clipboard.writeText(text).then(() => true, () => false);
  if (!copied) {
    const area = element("textarea", text);
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
  }
  if (copied) toast("success", done);
  else toast("error", say("FastUSP: not copied"), say("The browser does not allow it"));
}

/** Copies what a bug report should have, of a pool. */
export async function copyReport(devices) {
  try {
    await copy(await readReport(devices), say("FastUSP: report copied"));
  } catch (error) {
    toast("error", say("FastUSP: no report"), error.message);
  }
}
