// Rate: full screen, by keys. One picture, two beside each other, or nine; the queue goes on behind it.
import { api } from "../../../scripts/api.js";
import { lookAt, makePictures } from "./graphs.js";
import { attempt, iconButton, make, say } from "./parts.js";
import { recent } from "./recent.js";
import { listen, needed, rate, refresh, tastes, undo } from "./tastes.js";
import { t } from "./texts.js";

const AT_ONCE = { single: 1, pairs: 2, grid: 9 };
const HELP = {
  single: "→ or L like · ← or D dislike · ↓ skip · Z undo · Space zoom · P pairs · Esc end",
  pairs: "← or → the better one · ↑ both · ↓ neither · Z undo · Space zoom · P grid · Esc end",
  grid: "Arrows choose · L like · D dislike · N skip the rest · Z undo · Space zoom · P single · Esc end",
};
const MADE = 4; // pictures a click
const LOOK_EVERY = 10; // verdicts after which the means have moved

let view = null;

export async function openRateView() {
  if (view) return;
  view = { taste: "", mode: "single", zoom: false, cursor: 0, now: [], skipped: new Set(), verdicts: 0, looked: 0, waiting: new Set(), back: document.activeElement };
  view.element = make("div", { class: "prefgen-rate", role: "dialog", "aria-modal": "true", "aria-label": t("Rate"), tabindex: "-1" });
  view.element.addEventListener("keydown", onKey);
  document.body.append(view.element);
  view.element.focus();
  await attempt(refresh);
  await attempt(() => recent.load());
  if (!view) return;
  view.taste = tastes.name; // "" until the first verdict makes one
  const stops = [recent.listen(draw), listen(draw)];
  view.stop = () => stops.forEach((stop) => stop());
  draw();
  attempt(look);
}

function close() {
  view.stop?.();
  view.element.remove();
  view.back?.focus?.();
  view = null;
}

/** Pictures without a verdict: those first of which the taste is least sure, then the newest. */
function waiting() {
  const rated = recent.verdicts();
  const open = recent.pictures.filter((picture) => !rated.has(recent.key(picture)) && !view.skipped.has(recent.key(picture)));
  const doubt = (picture) => Math.abs(recent.differences.get(recent.key(picture)) ?? Infinity);
  return open.map((picture, age) => ({ picture, age })).sort((a, b) => doubt(a.picture) - doubt(b.picture) || a.age - b.age).map(({ picture }) => picture);
}

/** Queue a look at what nobody has looked at yet; ComfyUI tells when it is done, and everything is ordered anew. */
async function look() {
  const unseen = recent.pictures.filter((picture) => !recent.differences.has(recent.key(picture)));
  const liked = (tastes.open?.pictures ?? []).some((picture) => picture.verdict === "liked");
  if (tastes.name && liked && unseen.length) await lookAt(tastes.name, unseen);
}

function draw() {
  if (!view) return;
  if (view.taste && tastes.name !== view.taste) {
    // Renamed or forgotten by another page: no key may go to the taste that took its place.
    say(t("{name} isn't open any more, so Rate was closed.", { name: view.taste }), "warn");
    close();
    return;
  }
  const pictures = waiting();
  fill(pictures);
  const head = make(
    "header",
    {},
    make("strong", {}, tastes.name || t("New taste")),
    make("span", { "aria-live": "polite" }, t("{n} given, {m} waiting", { n: view.verdicts, m: pictures.length })),
    make("button", { type: "button", class: "prefgen-button", "data-key": "make", onclick: () => attempt(paint) }, t("Make {n} pictures", { n: MADE })),
    iconButton("pi-times", t("Close (Esc)"), close),
  );
  const help = make("footer", {}, ...(view.mode === "single" ? buttons(view.now) : []), make("span", {}, t(HELP[view.mode])));
  view.element.replaceChildren(head, stage(), help);
  // A button that was clicked is gone with what it stood in, and the keys with it.
  if (!view.element.contains(document.activeElement) && !document.querySelector("dialog[open]")) view.element.focus();
}

/** What is shown stays until it is judged, whatever comes in meanwhile; the rest is filled up. */
function fill(pictures) {
  const count = AT_ONCE[view.mode];
  const open = new Set(pictures.map(recent.key));
  const staying = view.now.filter((picture) => open.has(recent.key(picture))).slice(0, count);
  const there = new Set(staying.map(recent.key));
  view.now = [...staying, ...pictures.filter((picture) => !there.has(recent.key(picture)))].slice(0, count);
  view.cursor = Math.min(view.cursor, Math.max(0, view.now.length - 1));
}

function stage() {
  const alone = view.zoom && view.mode === "grid";
  const shown = alone ? [view.now[view.cursor]].filter(Boolean) : view.now;
  const cells = shown.map((picture, number) => cell(picture, alone ? view.cursor : number));
  const none = view.now.length ? [] : [make("p", {}, t("Everything is rated. Make more pictures, or press Esc."))];
  const kind = view.mode === "grid" && !alone ? " prefgen-nine" : "";
  return make("div", { class: `prefgen-stage${view.zoom ? " prefgen-zoomed" : ""}${kind}` }, ...cells, ...none);
}

function cell(picture, number) {
  const image = make("img", { src: recent.source(picture), alt: picture.filename, onclick: () => clicked(number) });
  if (view.mode !== "grid") return image;
  const box = make("div", { class: "prefgen-cell", "aria-current": String(number === view.cursor) }, image, make("span", { class: "prefgen-verdicts" }, ...buttons([picture])));
  return box;
}

function clicked(number) {
  if (view.mode === "pairs") give(pair(number));
  else if (view.mode === "grid" && view.cursor !== number) {
    view.cursor = number;
    draw();
  } else toggleZoom();
}

function buttons(pictures) {
  return [
    iconButton("pi-thumbs-down", t("Dislike"), () => give(pictures.map((picture) => [picture, "disliked"]))),
    iconButton("pi-thumbs-up", t("Like"), () => give(pictures.map((picture) => [picture, "liked"]))),
  ];
}

/** The verdicts of choosing one of two. */
function pair(better) {
  return view.now.map((picture, number) => [picture, number === better ? "liked" : "disliked"]);
}

let turn = Promise.resolve();

/** Run what changes the taste one after the other: an undo right behind a verdict takes that one back. */
function inTurn(action) {
  turn = turn.then(() => attempt(action));
  return turn;
}

/** Rate a picture in the taste that the view was opened for; the first verdict of all makes one. */
async function rateHere(picture, verdict, name) {
  const answer = await rate([picture], verdict, name || view?.taste || undefined);
  if (view && !view.taste) view.taste = answer.name;
  return answer;
}

function give(verdicts) {
  const name = view.taste;
  // Out of sight at once: the next key is for the next picture, however long the server takes.
  for (const [picture] of verdicts) view.skipped.add(recent.key(picture));
  draw();
  return inTurn(async () => {
    const given = verdicts.filter(([, verdict]) => verdict);
    try {
      for (const [picture, verdict] of given) await recent.remember([picture], await rateHere(picture, verdict, name));
      if (view) view.verdicts += given.length;
    } finally {
      // From now on its verdict keeps a picture away; where it got none, it is asked again.
      for (const [picture] of given) view?.skipped.delete(recent.key(picture));
      draw();
    }
    if (view && view.verdicts >= view.looked + LOOK_EVERY) {
      view.looked = view.verdicts;
      await look();
    }
  });
}

async function paint() {
  await needed();
  const ids = await makePictures(MADE);
  for (const id of ids) {
    recent.temporary.add(id);
    view?.waiting.add(id);
  }
  say(t("{n} pictures wait in the queue; they come in here.", { n: ids.length }));
}

api.addEventListener("execution_success", ({ detail }) => {
  if (view?.waiting.delete(detail?.prompt_id) && !view.waiting.size) attempt(look);
});
let soon = 0;
api.addEventListener("prefgen.taste", () => {
  clearTimeout(soon);
  soon = setTimeout(() => view && recent.look().catch(() => {}), 300);
});

function toggleZoom() {
  view.zoom = !view.zoom;
  draw();
}

function nextMode() {
  const modes = Object.keys(AT_ONCE);
  view.mode = modes[(modes.indexOf(view.mode) + 1) % modes.length];
  view.zoom = false;
  draw();
}

function onKey(event) {
  event.stopPropagation();
  const key = event.key.toLowerCase();
  if (key === "tab" || (key === "enter" && event.target.matches("button"))) return;
  if (key === " " && event.target.matches("button")) return;
  event.preventDefault();
  const common = { escape: close, z: takeBack, " ": toggleZoom, p: nextMode };
  if (key in common) common[key]();
  else if (view.now.length) KEYS[view.mode](key);
}

function takeBack() {
  const name = view.taste || tastes.name;
  inTurn(async () => {
    await undo(false, name);
    if (!view) return;
    view.now = []; // what was undone is asked again, as everything else in its place
    draw();
  });
}

const KEYS = {
  single(key) {
    const verdict = { arrowright: "liked", l: "liked", arrowleft: "disliked", d: "disliked", arrowdown: "" }[key];
    if (verdict !== undefined) give(all(verdict));
  },
  pairs(key) {
    if (view.now.length < 2) return KEYS.single(key);
    const verdicts = { arrowleft: () => pair(0), arrowright: () => pair(1), arrowup: () => all("liked"), arrowdown: () => all("disliked") }[key];
    if (verdicts) give(verdicts());
  },
  grid(key) {
    const step = { arrowleft: -1, arrowright: 1, arrowup: -3, arrowdown: 3 }[key];
    const verdict = { l: "liked", d: "disliked" }[key];
    if (verdict) give([[view.now[view.cursor], verdict]]);
    else if (key === "n") give(all(""));
    else if (step) {
      view.cursor = Math.max(0, Math.min(view.now.length - 1, view.cursor + step));
      draw();
    }
  },
};

function all(verdict) {
  return view.now.map((picture) => [picture, verdict]);
}
