// What of FastUSP this page shows: told to the server once (POST /fastusp/watch), which then sends what changes by itself
// ("fastusp.pools", "fastusp.loads", "fastusp.log"). Nothing is asked again and again.

import { api } from "../../scripts/api.js";
import { post } from "./pools.js";

/** panel: whether it is open. log: the pool whose log is shown, { devices, from: the line that is wanted next }. */
const shown = { panel: false, log: null };

let told = true; // what is shown, to this connection
let telling = Promise.resolve();

export const clientId = () => api.clientId ?? api.initialClientId;

/** Tells the server what is shown from now on. */
export function watch(changes) {
  Object.assign(shown, changes);
  tell();
}

function tell() {
  told = true;
  const send = () => post("/fastusp/watch", JSON.stringify({ client: clientId(), ...shown }));
  telling = telling.then(send).catch((error) => {
    told = false; // as before the connection is there, which begins with a status
    console.warn("FastUSP: ComfyUI was not told what the page shows:", error);
  });
}

export function followConnection() {
  api.addEventListener("status", ({ detail }) => detail && (told || tell())); // none where it is lost
  api.addEventListener("reconnected", () => (shown.panel || shown.log) && tell());
}
