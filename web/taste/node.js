// Load Preference History in the browser: its pictures below it, and halves that take drops.
import { app } from "../../../scripts/app.js";
import { iconButton, make } from "./parts.js";
import { onDrop } from "./panel.js";
import { ask, choose, listen, path, thumbnail } from "./tastes.js";
import { t } from "./texts.js";

const NODE = "PrefGen_LoadPreferenceHistory";
const HEIGHT = 150; // of the grid, which scrolls: without a bound it would cover the node below
const SHOWN = 60;
const fills = new WeakMap(); // node's box -> how often it was filled

export function dressHistoryNode(node) {
  if (node.comfyClass !== NODE) return;
  const box = make("div", { class: "prefgen-node" });
  node.addDOMWidget("pictures", "prefgen_pictures", box, { serialize: false, getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT });
  const combo = node.widgets.find((widget) => widget.name === "history");
  const draw = () => fill(box, combo?.value);
  const changed = combo.callback;
  combo.callback = function (...words) {
    const result = changed?.apply(this, words);
    draw();
    return result;
  };
  const stop = listen(draw);
  const removed = node.onRemoved;
  node.onRemoved = function (...words) {
    stop();
    return removed?.apply(this, words);
  };
  const take = async (event, left) => {
    const own = isTaste(combo.value) ? combo.value : undefined;
    const name = await onDrop(event, left ? "liked" : "disliked", own);
    // Dropped on an example user or a revision, which take nothing: the open taste took it and is read from now on.
    if (name && name !== combo.value) {
      combo.value = name;
      combo.callback?.(name);
      app.canvas?.setDirty?.(true, true);
    }
  };
  box.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.stopPropagation();
    box.classList.add("prefgen-over");
  });
  box.addEventListener("dragleave", () => box.classList.remove("prefgen-over"));
  box.addEventListener("drop", (event) => {
    box.classList.remove("prefgen-over");
    const rectangle = box.getBoundingClientRect();
    take(event, event.clientX < rectangle.left + rectangle.width / 2);
  });
  node.onDragOver = (event) => Boolean(event.dataTransfer?.items?.length);
  // On the canvas, where the halves may be too small to be drawn: the box has no place on the page then.
  node.onDragDrop = (event) => {
    const [x] = app.canvas.convertEventToCanvasOffset(event);
    take(event, x < node.pos[0] + node.size[0] / 2);
    return true;
  };
  setTimeout(draw);
}

/** Whether a history is a taste that goes on: no bundled user, no revision. */
function isTaste(name) {
  return Boolean(name) && !name.startsWith("example: ") && !/@[0-9a-f]{8}$/.test(name);
}

async function fill(box, name) {
  const asked = (fills.get(box) ?? 0) + 1;
  fills.set(box, asked);
  box.dataset.name = name ?? "";
  let taste = null;
  if (isTaste(name)) taste = await ask("GET", path(name)).catch(() => null);
  if (fills.get(box) !== asked) return; // chosen or rated anew meanwhile
  const halves = ["liked", "disliked"].map((verdict) => half(taste, name, verdict));
  const open = taste ? iconButton("pi-external-link", t("Open in panel"), () => showPanel(name)) : null;
  box.replaceChildren(...halves, ...(open ? [open] : []));
}

function half(taste, name, verdict) {
  const pictures = (taste?.pictures ?? []).filter((picture) => picture.verdict === verdict).reverse();
  const images = pictures.slice(0, SHOWN).map((picture) => make("img", { src: thumbnail(name, picture.sha256), alt: picture.file, title: picture.file, loading: "lazy" }));
  const [counted, empty] = verdict === "liked" ? [t("{n} liked", { n: pictures.length }), t("Drop what you like")] : [t("{n} disliked", { n: pictures.length }), t("Drop what you don't")];
  const title = taste ? counted : empty;
  return make("div", { class: "prefgen-half", "data-verdict": verdict }, make("span", {}, title), make("div", {}, ...images));
}

async function showPanel(name) {
  await choose(name);
  const manager = app.extensionManager;
  const bar = manager?.sidebarTab;
  if (bar?.activeSidebarTabId !== "prefgen-taste") bar?.toggleSidebarTab?.("prefgen-taste");
}
