// Like and dislike on any picture that a node shows: by menu, or Alt+L and Alt+D.
import { app } from "../../../scripts/app.js";
import { attempt, say, viewOf } from "./parts.js";
import { recent } from "./recent.js";
import { rate } from "./tastes.js";
import { t } from "./texts.js";

/** What a node shows: the picture that is looked at, or all of them. */
export function picturesOf(node) {
  const images = node?.imgs ?? [];
  const chosen = node?.imageIndex ?? (images.length === 1 ? 0 : node?.overIndex);
  const looked = chosen == null ? images : [images[chosen]];
  return looked.map((image) => viewOf(image?.src ?? "")).filter(Boolean);
}

export function rateNodes(nodes, verdict) {
  return attempt(async () => {
    const pictures = nodes.flatMap(picturesOf);
    if (!pictures.length) {
      say(t("Select a node that shows a picture, such as Save Image."), "warn");
      return;
    }
    const answer = await rate(pictures, verdict);
    recent.remember(pictures, answer);
    const values = { n: pictures.length, name: answer.name };
    say(verdict === "liked" ? t("Liked in {name}: {n}", values) : t("Disliked in {name}: {n}", values), "success");
  });
}

export function selectedNodes() {
  const canvas = app.canvas;
  const selected = Object.values(canvas?.selected_nodes ?? {});
  if (selected.length) return selected;
  return canvas?.node_over ? [canvas.node_over] : [];
}

export function menuItems(node) {
  if (!picturesOf(node).length) return [];
  return [
    { content: t("Like (Alt+L)"), callback: () => rateNodes([node], "liked") },
    { content: t("Dislike (Alt+D)"), callback: () => rateNodes([node], "disliked") },
  ];
}
