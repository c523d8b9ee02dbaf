// Our sentences where an artist sees them: newer front ends hide what a node says behind "check its inputs".
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { say } from "./parts.js";

const OURS = "PrefGen_";

export function showFaults() {
  api.addEventListener("execution_error", ({ detail }) => {
    if (!detail?.node_type?.startsWith(OURS)) return;
    const node = app.graph?.getNodeById?.(Number(detail.node_id));
    say(detail.exception_message?.trim() ?? "", "error", node?.title ?? detail.node_type);
    if (node) {
      app.canvas?.selectNode?.(node, false);
    }
  });
}
