// The sidebar "Taste": which taste is open, what was painted lately, what is liked and disliked.
import { api } from "../../../scripts/api.js";
import { hasAssets, importByTags } from "./assets.js";
import { askForText, attempt, confirm, filesOf, iconButton, make, uploaded, viewsOf } from "./parts.js";
import { openModels } from "./models.js";
import { openRateView } from "./rate.js";
import { recent } from "./recent.js";
import { ask, choose, leave, listen, make as makeTaste, needed, path, place, rate, refresh, tastes, thumbnail, undo, upload } from "./tastes.js";
import { t } from "./texts.js";
import { wordsTab } from "./words.js";

const WORKS = 6; // liked pictures that give a first taste
const SETTLED = 24; // pictures beyond which more change little: a matter of count until an encoder says more
const TABS = { recent: "Recent", liked: "Liked", disliked: "Disliked", words: "Words" };

let tab = "recent";
let assets = false; // whether this ComfyUI has them
const selected = new Set();
let last = null; // where a range of Shift begins

export function renderPanel(container) {
  const panel = make("section", { class: "prefgen-panel", tabindex: "-1", "aria-label": t("Taste") });
  container.replaceChildren(panel);
  const draw = () => panel.isConnected && fill(panel);
  const unlisten = [listen(draw), recent.listen(draw)];
  panel.addEventListener("keydown", onKey);
  panel.addEventListener("dragover", (event) => event.preventDefault());
  panel.addEventListener("drop", (event) => onDrop(event, tab === "disliked" ? "disliked" : "liked"));
  fill(panel);
  attempt(refresh);
  attempt(() => recent.load());
  hasAssets().then((there) => {
    assets = there;
    draw();
  });
  return () => unlisten.forEach((stop) => stop());
}

function fill(panel) {
  const focused = document.activeElement?.dataset?.key;
  const top = panel.querySelector(".prefgen-grid")?.scrollTop ?? 0;
  const typed = panel.querySelector("[data-key]:focus")?.value;
  const isMenuOpen = panel.querySelector(".prefgen-menu")?.open;
  panel.replaceChildren(head(), meter(), tabs(), tab === "words" ? wordsTab() : grid(), foot());
  const scrolled = panel.querySelector(".prefgen-grid");
  if (scrolled) scrolled.scrollTop = top;
  if (isMenuOpen) panel.querySelector(".prefgen-menu").open = true;
  const field = focused && panel.querySelector(`[data-key="${CSS.escape(focused)}"]`);
  field?.focus();
  if (field?.matches?.("input") && typed) field.value = typed;
}

function head() {
  const options = tastes.all.map(({ name }) => make("option", { value: name, selected: name === tastes.name }, name));
  const list = make("select", { "aria-label": t("Taste"), "data-key": "list", onchange: (event) => attempt(() => choose(event.target.value)) }, ...options);
  list.disabled = !options.length;
  return make(
    "header",
    {},
    list,
    iconButton("pi-plus", t("New taste"), () => attempt(newTaste)),
    iconButton("pi-clone", t("Rate"), () => openRateView(), { "data-key": "rate" }),
    menu(),
  );
}

async function newTaste() {
  const name = await askForText(t("New taste"), t("What is it called?"));
  if (name) await makeTaste(name);
}

function menu() {
  const entries = [
    [t("Rename…"), renameTaste],
    [t("Copy…"), copyTaste],
    [t("Export (without prompts and places)"), () => download("/export")],
    [t("Export with prompts and metadata"), () => download("/export?private=1")],
    [t("Import a zip…"), () => importInto({ accept: ".zip" })],
    [t("Import a folder…"), () => importInto({ multiple: true, webkitdirectory: true })],
    [t("Import by tags of assets…"), importTagged, !assets],
    [t("Empty the trash"), emptyTrash],
    [t("Forget this taste…"), forgetTaste],
  ];
  const button = (label, action, disabled) => make("button", { type: "button", role: "menuitem", "data-key": `menu ${label}`, disabled, onclick: () => attempt(action) }, label);
  const buttons = entries.filter(([, , hidden]) => !hidden).map(([label, action]) => button(label, action, !tastes.name));
  buttons.push(button(t("Model files…"), openModels, false));
  const sign = make("i", { class: "pi pi-ellipsis-h", "aria-hidden": "true" });
  const summary = make("summary", { class: "prefgen-button", title: t("More"), "aria-label": t("More"), "data-key": "more" }, sign);
  const details = make("details", { class: "prefgen-menu" }, summary, make("div", { role: "menu" }, ...buttons));
  details.addEventListener("click", (event) => event.target.role === "menuitem" && details.removeAttribute("open"));
  return details;
}

// Each is for the taste that was open when it was chosen: while a dialog waits, another page may take that one away, and
// then another is open.

async function renameTaste() {
  const old = tastes.name;
  const name = await askForText(t("Rename"), t("What is it called from now on?"), old);
  if (name) await choose((await leave(old, () => ask("POST", path(old, "/rename"), { name }))).name);
}

async function copyTaste() {
  const old = tastes.name;
  const name = await askForText(t("Copy"), t("What is the copy called?"), `${old} 2`);
  if (name) await choose((await ask("POST", path(old, "/copy"), { name })).name);
}

async function emptyTrash() {
  const { name } = tastes;
  const sure = await confirm(t("Empty the trash"), t("Old revisions may then miss pictures. Delete them for good?"));
  if (sure) await ask("POST", path(name, "/empty_trash"), {});
}

async function forgetTaste() {
  const { name } = tastes;
  const sure = await confirm(t("Forget this taste"), t("{name}: pictures, journal and trash are deleted for good.", { name }));
  if (!sure) return;
  await leave(name, () => ask("DELETE", path(name)));
  await refresh();
}

function importInto(options) {
  const { name } = tastes;
  pickFiles(options, (files) => importFiles(files, name));
}

async function importTagged() {
  const done = await importByTags();
  if (done) uploaded(done, t("Imported"));
}

function download(rest) {
  const link = make("a", { href: api.apiURL(`/prefgen/${path(tastes.name, rest)}`), download: "" });
  link.click();
}

async function importFiles(files, name) {
  const form = new FormData();
  for (const file of files) form.append("file", file, file.path ?? (file.webkitRelativePath || file.name));
  uploaded(await ask("POST", path(name, "/import"), undefined, form), t("Imported"));
  await refresh();
}

export function pickFiles(options, action) {
  const input = make("input", { type: "file", ...options });
  input.addEventListener("change", () => input.files.length && attempt(() => action([...input.files])));
  input.click();
}

/** How settled the taste is: by leave-one-out agreement where CLIP vision has looked at it, else by count. */
function meter() {
  const pictures = tastes.open?.pictures ?? [];
  const liked = pictures.filter((picture) => picture.verdict === "liked").length;
  const settled = tastes.open?.settled;
  const share = settled ? settled.agreement : Math.min(1, pictures.length / SETTLED);
  let words = t("Drop pictures you like here, or like one that you have painted.");
  if (settled) words = t("{percent}% of {n} verdicts follow from the others.", { percent: Math.round(100 * share), n: settled.pictures });
  else if (liked >= WORKS) words = pictures.length < SETTLED ? t("Works. Each further verdict helps.") : t("Settled.");
  else if (liked) words = t("Works already; {n} more liked ones make it clearer.", { n: WORKS - liked });
  const percent = Math.round(100 * share);
  const bar = make("div", { class: "prefgen-meter", role: "meter", "aria-label": t("How settled the taste is"), "aria-valuenow": percent, "aria-valuemin": 0, "aria-valuemax": 100 }, make("div", { style: `width: ${percent}%` }));
  const shared = tastes.multiUser ? make("p", { class: "prefgen-note" }, t("All users of this server share its tastes.")) : null;
  return make("div", {}, bar, make("p", { class: "prefgen-note" }, words), shared);
}

function tabs() {
  const counts = { recent: recent.pictures.length, words: "" };
  for (const { verdict } of tastes.open?.pictures ?? []) counts[verdict] = (counts[verdict] ?? 0) + 1;
  const buttons = Object.entries(TABS).map(([key, label]) => {
    const onclick = () => {
      tab = key;
      selected.clear();
      const panel = document.querySelector(".prefgen-panel");
      if (panel) fill(panel);
    };
    return make("button", { type: "button", role: "tab", "aria-selected": String(tab === key), "data-key": `tab ${key}`, onclick }, `${t(label)} ${counts[key] ?? 0}`.trim());
  });
  return make("nav", { role: "tablist" }, ...buttons);
}

/** What the open tab shows, newest first: [{key, source, title, verdict, like(verdict)}]. */
function shown() {
  if (tab === "words") return [];
  if (tab === "recent") {
    const verdicts = recent.verdicts();
    return recent.pictures.map((picture) => ({
      key: recent.key(picture),
      source: recent.source(picture),
      title: picture.filename,
      verdict: verdicts.get(recent.key(picture)) ?? "",
      picture,
    }));
  }
  const pictures = (tastes.open?.pictures ?? []).filter((picture) => picture.verdict === tab);
  return pictures.reverse().map((picture) => ({
    key: picture.sha256,
    source: thumbnail(tastes.name, picture.sha256),
    title: picture.prompt ? `${picture.file}: ${picture.prompt}` : picture.file,
    verdict: picture.verdict,
    sha256: picture.sha256,
  }));
}

function grid() {
  const cells = shown().map((item) => cell(item));
  const words = { recent: t("Nothing painted yet."), liked: t("Nothing liked yet."), disliked: t("Nothing disliked yet.") }[tab];
  return make("div", { class: "prefgen-grid", role: "listbox", "aria-multiselectable": "true", "aria-label": t(TABS[tab]) }, ...(cells.length ? cells : [make("p", { class: "prefgen-note" }, words)]));
}

function cell(item) {
  const picture = make("img", { src: item.source, alt: item.title, loading: "lazy", draggable: "true" });
  const buttons = make(
    "span",
    { class: "prefgen-verdicts" },
    iconButton("pi-thumbs-up", t("Like"), (event) => act(event, [item], "liked"), { "aria-pressed": String(item.verdict === "liked"), tabindex: "-1" }),
    iconButton("pi-thumbs-down", t("Dislike"), (event) => act(event, [item], "disliked"), { "aria-pressed": String(item.verdict === "disliked"), tabindex: "-1" }),
    item.sha256 ? iconButton("pi-times", t("Remove"), (event) => act(event, [item], ""), { tabindex: "-1" }) : null,
  );
  return make(
    "figure",
    {
      role: "option",
      tabindex: "0",
      title: item.title,
      "data-key": item.key,
      "data-verdict": item.verdict,
      "aria-selected": String(selected.has(item.key)),
      onclick: (event) => select(event, item.key),
    },
    picture,
    buttons,
  );
}

function select(event, key) {
  const keys = shown().map((item) => item.key);
  if (event.shiftKey && last !== null && keys.includes(last)) {
    const [from, to] = [keys.indexOf(last), keys.indexOf(key)].sort((a, b) => a - b);
    keys.slice(from, to + 1).forEach((each) => selected.add(each));
  } else {
    const was = selected.has(key);
    if (!(event.ctrlKey || event.metaKey)) selected.clear();
    if (was) selected.delete(key);
    else selected.add(key);
    last = key;
  }
  const panel = event.target.closest(".prefgen-panel");
  if (panel) fill(panel);
}

function act(event, items, verdict) {
  event?.stopPropagation();
  return attempt(async () => {
    const own = items.filter((item) => item.sha256).map((item) => item.sha256);
    const painted = items.filter((item) => item.picture).map((item) => item.picture);
    if (own.length) await place(own, verdict);
    if (painted.length && verdict) recent.remember(painted, await rate(painted, verdict));
    selected.clear();
  });
}

function onKey(event) {
  if (event.target.closest("select, input, summary, .prefgen-words, .prefgen-menu")) return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && key === "z") {
    consume(event);
    attempt(() => undo(event.shiftKey));
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const own = event.target.dataset?.key;
  const items = shown().filter((item) => (selected.size ? selected.has(item.key) : item.key === own));
  const verdict = { l: "liked", d: "disliked", delete: "", backspace: "" }[key];
  if (verdict !== undefined && items.length) {
    consume(event);
    act(null, items, verdict);
  } else if (key === " " && own && event.target.matches("figure")) {
    consume(event);
    select({ target: event.target, ctrlKey: true }, own);
  } else if (key.startsWith("arrow") && event.target.matches("figure")) {
    consume(event);
    move(event.target, key);
  }
}

function move(figure, key) {
  const figures = [...figure.parentElement.querySelectorAll("figure")];
  const width = figures.filter((each) => each.offsetTop === figures[0].offsetTop).length;
  const step = { arrowleft: -1, arrowright: 1, arrowup: -width, arrowdown: width }[key];
  figures[figures.indexOf(figure) + step]?.focus();
}

function consume(event) {
  event.preventDefault();
  event.stopPropagation();
}

/** Rate what was dropped in the taste `name`, else in the open one; the name of the taste that took it. */
export async function onDrop(event, verdict, name) {
  consume(event);
  const views = viewsOf(event);
  const dropped = filesOf(event); // before anything is waited for
  return attempt(async () => {
    const files = await dropped;
    if (!views.length && !files.length) return undefined;
    const target = name ?? (await needed());
    if (views.length) await rate(views, verdict, target);
    else uploaded(await upload(files, verdict, target), verdict === "liked" ? t("Liked") : t("Disliked"));
    return target;
  });
}

function foot() {
  const open = tastes.open;
  return make(
    "footer",
    {},
    iconButton("pi-undo", t("Undo (Ctrl+Z)"), () => attempt(() => undo()), { disabled: !open?.can_undo, "data-key": "undo" }),
    iconButton("pi-refresh", t("Redo (Ctrl+Shift+Z)"), () => attempt(() => undo(true)), { disabled: !open?.can_redo, "data-key": "redo" }),
    iconButton("pi-upload", t("Like files…"), () => pickFiles({ accept: "image/*", multiple: true }, async (files) => uploaded(await upload(files, "liked"), t("Liked")))),
    make("span", { class: "prefgen-note", title: t("The revision: what is read now, by name") }, open ? `${open.name}@${open.revision}` : ""),
  );
}
