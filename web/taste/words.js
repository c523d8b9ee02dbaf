// Words: what the MLLM understood of a taste, as chips. x strikes one out, typing adds one.
import { describe } from "./graphs.js";
import { attempt, iconButton, make, say } from "./parts.js";
import { t } from "./texts.js";
import { ask, path, refresh, tastes } from "./tastes.js";

const SIDES = { liked: "For the positive prompt", disliked: "For the negative prompt" };

export function wordsTab() {
  const words = tastes.open?.words;
  if (!words) return make("div", { class: "prefgen-words" });
  const read = make("button", { type: "button", class: "prefgen-button", "data-key": "read", onclick: () => attempt(readAgain) }, t("Read the pictures"));
  return make("div", { class: "prefgen-words" }, ...Object.keys(SIDES).map((side) => half(words, side)), read, make("p", { class: "prefgen-note" }, state(words)));
}

function state({ understood }) {
  if (!understood.words) return t("Nobody has read this taste yet: the MLLM does it in ComfyUI's queue.");
  if (understood.revision !== tastes.open.revision) return t("Understood before the last change: read the pictures again.");
  return t("Describe Preference and Apply Taste go by these words. The percentage says how sure the MLLM was.");
}

function half(words, side) {
  const added = words[side].added;
  const struck = new Set(words[side].struck.map(folded));
  const understood = (words.understood.words ?? []).filter((each) => each.side === side);
  const there = new Set(understood.map((each) => folded(each.word)));
  const chips = [
    ...understood.map(({ word, sure }) => chip(side, word, sure, struck.has(folded(word)) ? "struck" : "")),
    ...words[side].struck.filter((word) => !there.has(folded(word))).map((word) => chip(side, word, null, "struck")),
    ...added.filter((word) => !there.has(folded(word))).map((word) => chip(side, word, null, "added")),
  ];
  const field = make("input", {
    type: "text",
    maxlength: "120",
    placeholder: t("Add a word…"),
    "aria-label": `${t(SIDES[side])}: ${t("Add a word…")}`,
    "data-key": `add ${side}`,
    onkeydown: (event) => {
      event.stopPropagation(); // the panel's keys rate pictures
      if (event.key !== "Enter" || !field.value.trim()) return;
      const word = field.value;
      field.value = "";
      attempt(() => tell(side, word, "added"));
    },
  });
  return make("section", { "data-side": side }, make("h3", {}, t(SIDES[side])), make("ul", {}, ...chips), field);
}

function chip(side, word, sure, now) {
  const button =
    now === "struck"
      ? iconButton("pi-undo", t("Put “{word}” back", { word }), () => attempt(() => tell(side, word, "")))
      : iconButton("pi-times", t("Strike out “{word}”", { word }), () => attempt(() => tell(side, word, now === "added" ? "" : "struck")));
  const share = sure == null ? null : make("small", { title: t("How sure the MLLM was") }, `${Math.round(100 * sure)}%`);
  return make("li", { class: "prefgen-chip", "data-word": word, "data-state": now }, make("span", {}, word), share, button);
}

async function tell(side, word, now) {
  await ask("POST", path(tastes.name, "/words"), { side, word, state: now });
  await refresh();
}

async function readAgain() {
  if (!(tastes.open?.pictures ?? []).some((picture) => picture.verdict === "liked")) {
    throw new Error(t("Like a picture first: there is nothing to read."));
  }
  const id = await describe(tastes.name);
  if (!id) throw new Error(t("There is no preference MLLM: fetch one under Model files."));
  say(t("The MLLM reads the pictures as soon as the queue comes to it."));
}

/** The same for words that differ in case alone, as the server sees it. */
function folded(word) {
  return word.normalize("NFC").toLowerCase();
}
