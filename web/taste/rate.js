// Rate: full screen, by keys. One picture or two beside each other; the queue goes on behind it.
import { attempt, iconButton, make } from "./parts.js";
import { recent } from "./recent.js";
import { rate, refresh, tastes, undo } from "./tastes.js";

const HELP = {
  single: "→ or L like · ← or D dislike · ↓ skip · Z undo · Space zoom · P pairs · Esc end",
  pairs: "← or → the better one · ↑ both · ↓ neither · Z undo · Space zoom · P single · Esc end",
};

let view = null;

export async function openRateView() {
  if (view) return;
  await attempt(refresh);
  await attempt(() => recent.load());
  view = { mode: "single", zoom: false, skipped: new Set(), given: 0, back: document.activeElement };
  view.element = make("div", { class: "prefgen-rate", role: "dialog", "aria-modal": "true", "aria-label": "Rate", tabindex: "-1" });
  view.element.addEventListener("keydown", onKey);
  document.body.append(view.element);
  view.stop = recent.listen(draw);
  draw();
  view.element.focus();
}

function close() {
  view.stop();
  view.element.remove();
  view.back?.focus?.();
  view = null;
}

/** Pictures without a verdict, newest first. */
function waiting() {
  const rated = recent.verdicts();
  return recent.pictures.filter((picture) => !rated.has(recent.key(picture)) && !view.skipped.has(recent.key(picture)));
}

function draw() {
  if (!view) return;
  const pictures = waiting();
  const now = pictures.slice(0, view.mode === "pairs" ? 2 : 1);
  view.now = now;
  const images = now.map((picture, number) =>
    make("img", { src: recent.source(picture), alt: picture.filename, onclick: () => (view.mode === "pairs" ? give(pair(number)) : toggleZoom()) }),
  );
  const stage = make("div", { class: `prefgen-stage${view.zoom ? " prefgen-zoomed" : ""}` }, ...images);
  if (!now.length) stage.append(make("p", {}, "Everything is rated. Paint more, or press Esc."));
  const like = iconButton("pi-thumbs-up", "Like", () => give(now.map((picture) => [picture, "liked"])));
  const dislike = iconButton("pi-thumbs-down", "Dislike", () => give(now.map((picture) => [picture, "disliked"])));
  const head = make(
    "header",
    {},
    make("strong", {}, tastes.name || "New taste"),
    make("span", { "aria-live": "polite" }, `${view.given} given, ${pictures.length} waiting`),
    iconButton("pi-times", "Close (Esc)", close),
  );
  view.element.replaceChildren(head, stage, make("footer", {}, view.mode === "single" ? dislike : null, view.mode === "single" ? like : null, make("span", {}, HELP[view.mode])));
}

/** The verdicts of choosing one of two. */
function pair(better) {
  return view.now.map((picture, number) => [picture, number === better ? "liked" : "disliked"]);
}

function give(verdicts) {
  return attempt(async () => {
    for (const [picture, verdict] of verdicts) {
      if (!verdict) view.skipped.add(recent.key(picture));
      else recent.remember([picture], verdict, await rate([picture], verdict));
    }
    if (view) view.given += verdicts.filter(([, verdict]) => verdict).length;
    draw();
  });
}

function toggleZoom() {
  view.zoom = !view.zoom;
  draw();
}

function onKey(event) {
  const key = event.key.toLowerCase();
  const both = (verdict) => view.now.map((picture) => [picture, verdict]);
  const single = { arrowright: "liked", l: "liked", arrowleft: "disliked", d: "disliked", arrowdown: "" };
  const pairs = { arrowleft: () => pair(0), arrowright: () => pair(1), arrowup: () => both("liked"), arrowdown: () => both("disliked") };
  event.stopPropagation();
  if (key === "tab") return;
  event.preventDefault();
  if (key === "escape") close();
  else if (key === "z") attempt(() => undo()).then(draw);
  else if (key === " ") toggleZoom();
  else if (key === "p") {
    view.mode = view.mode === "single" ? "pairs" : "single";
    draw();
  } else if (view.now.length && view.mode === "single" && key in single) give(both(single[key]));
  else if (view.now.length === 2 && view.mode === "pairs" && key in pairs) give(pairs[key]());
}
