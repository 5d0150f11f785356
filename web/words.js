// The page's own words in the language that ComfyUI is set to. Those in the code are English, and the keys of the other
// languages' tables in words/. What the server says (errors, phases, what a plan comes to) is English in all of them.

import { app } from "../../scripts/app.js";

const TRANSLATED = ["ja", "zh"];

let table = {};

/** A text in the page's language; {name} in it becomes what `values` have under that name. */
export function say(text, values = {}) {
  return (table[text] ?? text).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** A text that `say` is given later, marked for the tables' test. */
export const word = (text) => text;

app.registerExtension({
  name: "FastUSP.Words",
  /** Before there are nodes, tabs and messages. Another language takes a reload, as the help of nodes does. */
  async init() {
    const language = app.extensionManager?.setting?.get("Comfy.Locale");
    if (!TRANSLATED.includes(language)) return;
    const answer = await fetch(new URL(`words/${language}.json`, import.meta.url));
    if (answer.ok) table = await answer.json();
    else console.warn(`FastUSP: words/${language}.json answered ${answer.status}`);
  },
});

/** A number of bytes; what would be hardly any GB in MB. */
export function size(bytes) {
  if (bytes < 1e8) return `${Math.round(bytes / 1e6)} MB`;
  return `${(bytes / 1e9).toFixed(bytes < 1e9 ? 2 : 1)} GB`;
}
