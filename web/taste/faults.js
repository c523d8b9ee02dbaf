// Our sentences where an artist sees them: newer front ends hide what a node says behind "check its inputs".
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { iconButton, make } from "./parts.js";
import { t } from "./texts.js";

const OURS = "PrefGen_";
const SECONDS = 30;

export function showFaults() {
  api.addEventListener("execution_error", ({ detail }) => {
    if (!detail?.node_type?.startsWith(OURS)) return;
    show(detail.exception_message?.trim() ?? "", detail.node_type, String(detail.node_id));
  });
  // What is run next has faults of its own.
  api.addEventListener("execution_start", close);
}

function close() {
  document.querySelector(".prefgen-fault")?.remove();
}

function show(sentence, kind, id) {
  close();
  const node = nodeOf(id);
  const look = node ? make("button", { type: "button", class: "prefgen-button", onclick: () => showNode(node) }, t("Show node")) : null;
  const text = make("div", {}, make("strong", {}, node?.title ?? kind), make("p", {}, sentence));
  const fault = make("div", { class: "prefgen-fault", role: "alert" }, make("i", { class: "pi pi-exclamation-circle", "aria-hidden": "true" }), text, look, iconButton("pi-times", t("Close"), close));
  document.body.append(fault);
  setTimeout(() => fault.remove(), 1000 * SECONDS);
}

/** The node of an id as a run names it: "12", or "7:12" for node 12 inside the subgraph node 7. */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of id.split(":")) {
    node = graph?.getNodeById?.(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

function showNode(node) {
  const canvas = app.canvas;
  if (node.graph && node.graph !== canvas.graph) canvas.setGraph?.(node.graph);
  canvas.selectNode?.(node, false);
  canvas.centerOnNode?.(node);
  canvas.setDirty?.(true, true);
}
