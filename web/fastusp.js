// What the page has of FastUSP: the side panel and its commands (panel.js), the workers' log (log.js), news (toasts.js),
// and the status lines on nodes, which a page that is loaded in the middle of a run has not heard.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { logCommand, logTab } from "./log.js";
import { commands as poolCommands, tab } from "./panel.js";
import { followNews } from "./toasts.js";
import { isOpen } from "./values.js";
import { clientId, followConnection } from "./watch.js";

const commands = [...poolCommands, logCommand];

/** Shows again what the nodes of this page's running prompt say, unless another workflow has taken their place. */
async function showTexts() {
  const client = clientId();
  if (!client) return;
  const answer = await api.fetchApi(`/fastusp/texts?client=${encodeURIComponent(client)}`);
  if (!answer.ok) throw new Error(`/fastusp/texts answered ${answer.status}`);
  const { workflow, texts } = await answer.json();
  if (!isOpen(workflow)) return;
  for (const [nodeId, text] of Object.entries(texts))
    api.dispatchEvent(new CustomEvent("progress_text", { detail: { nodeId, text } }));
}

/** Nobody waits for it; where the server is away, it comes again. */
function showTextsSoon() {
  showTexts().catch((error) => console.warn("FastUSP: the nodes' texts were not read:", error));
}

app.registerExtension({
  name: "FastUSP.Pools",
  commands,
  menuCommands: [{ path: ["Extensions", "FastUSP"], commands: commands.map((command) => command.id) }],
  bottomPanelTabs: [logTab],
  afterConfigureGraph: showTextsSoon,
  setup() {
    // Older front ends have no side bar; the nodes do not need it.
    app.extensionManager?.registerSidebarTab?.(tab);
    api.addEventListener("reconnected", showTextsSoon);
    followConnection();
    followNews();
  },
});
