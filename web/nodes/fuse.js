// Fuse User Vector in the browser: what counts for the chosen adapter is shown, what does nothing for it is folded away.
import { app } from "../../../scripts/app.js";
import { ask } from "../taste/tastes.js";

const NODE = "PrefGen_FuseUserVector";
const COUNTS = { prefgen: ["semantic", "core"], ip_adapter: ["pooling", "push"] };
let kinds = null; // {adapter: "prefgen" or "ip_adapter"}, asked for once a page and again for a name that isn't in it

async function kindOf(adapter) {
  if (!kinds || !(adapter in kinds)) {
    const answer = await ask("GET", "adapters").catch(() => null);
    kinds = answer?.adapters ?? kinds ?? {};
  }
  return kinds[adapter];
}

export function dressFuseNode(node) {
  if (node.comfyClass !== NODE) return;
  const combo = node.widgets.find((widget) => widget.name === "adapter");
  const changed = combo.callback;
  combo.callback = function (...words) {
    const result = changed?.apply(this, words);
    fold(node, combo);
    return result;
  };
  // Once the graph has set the values.
  setTimeout(() => fold(node, combo));
}

async function fold(node, combo) {
  const adapter = combo.value;
  const kind = await kindOf(adapter);
  if (combo.value !== adapter) return; // chosen anew meanwhile
  for (const [of, names] of Object.entries(COUNTS)) {
    // Of an adapter that nobody knows everything is shown.
    for (const name of names) show(node, name, !kind || of === kind);
  }
  // Nodes 2.0 looks at a node's widgets again only when there are others.
  const widgets = [...node.widgets];
  node.widgets = [];
  node.widgets = widgets;
  const [width, height] = node.computeSize();
  node.setSize?.([Math.max(width, node.size[0]), height]);
  app.canvas?.setDirty?.(true, true);
}

/** Show or fold away a widget. One that is fed by a wire stays: its socket is in use. */
function show(node, name, visible) {
  const widget = node.widgets.find((each) => each.name === name);
  if (!widget) return;
  const fed = node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  const hidden = !visible && !fed;
  // The classic renderer asks the widget itself, Nodes 2.0 its options. What counts isn't among the advanced either.
  for (const each of [widget, (widget.options ??= {})]) {
    each.hidden = hidden;
    if (visible) each.advanced = false;
  }
}
