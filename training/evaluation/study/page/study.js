// The whole study in one page: no server, no network. Answers stay in this browser until they are saved as CSV.
"use strict";

const COLUMNS = ["study", "judge", "trial", "left", "right", "choice", "milliseconds", "timestamp"];
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "same", " ": "same" };
const $ = (id) => document.getElementById(id);

let judge = "";
let trials = []; // in this judge's order: {id, user, prompt, left, right}
let answers = []; // in the same order, as far as the judge has come
let shownAt = null; // when both pictures of the trial could be seen; null until then

/** Random numbers in 0..1 that are the same for the same text: FNV-1a for a seed, then 32-bit mixing steps. */
function randomOf(text) {
  let state = 2166136261;
  for (const byte of new TextEncoder().encode(text)) state = Math.imul(state ^ byte, 16777619);
  return () => {
    state = (state + 0x9e3779b9) | 0;
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 4294967296;
  };
}

function shuffled(items, random) {
  const found = [...items];
  for (let i = found.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}

/** Every trial once, sides and order at random for this judge. A repeat comes in the last third, its original in the
    first, with the sides exchanged. */
function planFor(name) {
  const random = randomOf(`${STUDY.study}/${name}`);
  const repeats = STUDY.trials.filter((trial) => trial.mirrors);
  const checked = new Set(repeats.map((trial) => trial.mirrors));
  const originals = STUDY.trials.filter((trial) => checked.has(trial.id));
  const others = shuffled(STUDY.trials.filter((trial) => !trial.mirrors && !checked.has(trial.id)), random);
  const third = Math.floor(others.length / 3);
  const order = [
    ...shuffled([...originals, ...others.slice(0, third)], random),
    ...others.slice(third, others.length - third),
    ...shuffled([...repeats, ...others.slice(others.length - third)], random),
  ];
  const flipped = new Map(STUDY.trials.filter((trial) => !trial.mirrors).map((trial) => [trial.id, random() < 0.5]));
  return order.map((trial) => {
    const flip = trial.mirrors ? !flipped.get(trial.mirrors) : flipped.get(trial.id);
    const [left, right] = flip ? [...trial.pictures].reverse() : trial.pictures;
    return { id: trial.id, user: trial.user, prompt: trial.prompt, left, right };
  });
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

const place = () => `picture-study/${STUDY.study}/${judge}`;

function keep() {
  try {
    localStorage.setItem(place(), JSON.stringify(answers));
  } catch {
    say("This browser keeps nothing for this page: save your answers before you close it.");
  }
}

/** The answers this judge gave here before; none if they don't fit the trials. */
function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(place())) ?? [];
    return found.every((answer, i) => answer.trial === trials[i]?.id) ? found : [];
  } catch {
    return [];
  }
}

function open(id) {
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== id;
  window.scrollTo(0, 0);
}

const source = (name) => `pictures/${name}.png`;

function fillHistory(verdict, names) {
  $(verdict).replaceChildren(
    ...names.map((name, i) => {
      const item = document.createElement("li");
      const image = document.createElement("img");
      image.src = source(name);
      image.alt = `${verdict === "liked" ? "Liked" : "Disliked"} picture ${i + 1} of ${names.length}`;
      item.append(image);
      return item;
    }),
  );
  if (!names.length) {
    const item = document.createElement("li");
    item.className = "none";
    item.textContent = "nothing known";
    $(verdict).append(item);
  }
}

/** Show the first trial without an answer, or the end. */
async function show() {
  const number = answers.length;
  shownAt = null;
  $("saved").textContent = "";
  if (number >= trials.length) {
    open("end");
    $("save").focus();
    return;
  }
  const trial = trials[number];
  open("trial");
  $("place").textContent = `Choice ${number + 1} of ${trials.length}`;
  $("progress").max = trials.length;
  $("progress").value = number;
  $("progress").setAttribute("aria-valuetext", `${number} of ${trials.length} made`);
  $("question").textContent = STUDY.title;
  $("prompt").textContent = trial.prompt;
  const history = STUDY.users[trial.user];
  fillHistory("liked", history.liked);
  fillHistory("disliked", history.disliked);
  $("undo").setAttribute("aria-disabled", String(number === 0));
  for (const side of ["left", "right"]) $(side).src = source(trial[side]);
  $("place").focus();
  try {
    await Promise.all([...document.querySelectorAll("#trial img")].map((image) => image.decode()));
  } catch {
    if (answers.length === number) say("A picture of this study is missing: ask the organiser for the whole folder.");
    return;
  }
  if (answers.length === number) shownAt = performance.now();
}

function answer(choice) {
  const trial = trials[answers.length];
  if (!trial || shownAt === null) return;
  answers.push({
    trial: trial.id,
    left: trial.left,
    right: trial.right,
    choice,
    milliseconds: Math.round(performance.now() - shownAt),
    timestamp: new Date().toISOString(),
  });
  keep();
  show();
}

function undo() {
  if (!answers.length) return;
  answers.pop();
  keep();
  show();
}

function csv() {
  const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
  const rows = answers.map((given) => {
    const row = { study: STUDY.study, judge, ...given };
    return COLUMNS.map((name) => cell(row[name])).join(",");
  });
  return [COLUMNS.join(","), ...rows, ""].join("\r\n");
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = `answers-${STUDY.study}-${judge.replaceAll(" ", "_")}.csv`;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  $("saved").textContent = `Saved ${answers.length} answers as ${link.download}, where this browser puts downloads.`;
}

function begin(event) {
  event.preventDefault();
  const name = $("judge").value.normalize("NFC").trim();
  if (!/^[\p{L}\p{N}][\p{L}\p{M}\p{N} ._-]*$/u.test(name)) {
    say("A name begins with a letter or digit and has letters, digits, spaces, dots, dashes and underscores only.");
    $("judge").focus();
    return;
  }
  say("");
  judge = name;
  trials = planFor(judge);
  answers = kept();
  show();
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !$("start").hidden) return;
  const onButton = document.activeElement?.tagName === "BUTTON";
  if (event.key === " " && onButton) return; // Space presses the button that has the focus
  if (event.key in KEYS && !$("trial").hidden) {
    event.preventDefault();
    answer(KEYS[event.key]);
  } else if (event.key === "u" || event.key === "U") {
    event.preventDefault();
    undo();
  }
});

$("who").addEventListener("submit", begin);
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => answer(button.dataset.choice));
}
for (const id of ["undo", "back"]) $(id).addEventListener("click", undo);
for (const id of ["save", "save-early"]) $(id).addEventListener("click", save);

if (typeof STUDY === "undefined") {
  say("The file data.js is missing: ask the organiser for the whole folder.");
} else {
  $("count").textContent = STUDY.trials.length;
  open("start");
  $("judge").focus();
}
