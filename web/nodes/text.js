// What a node says, below it: the front end draws such a text for core's own nodes alone.
import { make } from "../taste/parts.js";

const NODES = new Set(["PrefGen_DescribePreference", "PrefGen_ApplyTaste"]);
const WIDGET = "prefgen_text";
const HEIGHT = 90; // of the text, which scrolls

export function dressTextNode(node) {
  if (!NODES.has(node.comfyClass)) return;
  const executed = node.onExecuted;
  node.onExecuted = function (output, ...words) {
    const result = executed?.call(this, output, ...words);
    if (output?.text) show(this, [output.text].flat().join("\n"));
    return result;
  };
}

function show(node, text) {
  let widget = node.widgets?.find((each) => each.name === WIDGET);
  if (!widget) {
    const box = make("div", { class: "prefgen-text", tabindex: "0", role: "status" });
    widget = node.addDOMWidget(WIDGET, WIDGET, box, { serialize: false, getMinHeight: () => HEIGHT });
    widget.prefgenBox = box;
    const [width, height] = node.computeSize();
    node.setSize?.([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  }
  widget.prefgenBox.textContent = text;
  node.setDirtyCanvas?.(true, true);
}
