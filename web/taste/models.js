// Model files: the sets that PrefGen can fetch, as buttons. Nothing is fetched without a click.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { attempt, make, modal, say } from "./parts.js";
import { t } from "./texts.js";
import { ask } from "./tastes.js";

let current = null; // {name, state, done, total, error} of the set that is on its way
let events = 0; // that told of one: an answer that was asked for before the last is older than it
let asked = 0; // lists
let redraw = () => {};

api.addEventListener("prefgen.download", ({ detail }) => {
  const before = current?.state;
  current = detail;
  events += 1;
  if (detail.state === "failed") say(detail.error, "error");
  if (detail.state === "done") {
    say(t("{name} is there.", { name: detail.name }), "success");
    app.refreshComboInNodes?.();
  }
  redraw(before !== detail.state);
});

export async function openModels() {
  const list = make("div", { class: "prefgen-models" });
  const draw = async (anew = true) => {
    if (anew) {
      const number = (asked += 1);
      const before = events;
      const answer = await attempt(() => ask("GET", "downloads"));
      if (number !== asked) return; // a newer one draws
      sets = answer ?? sets;
      // After a lost connection, or a restart of the server, it knows better.
      if (answer && before === events) current = answer.current;
    }
    list.replaceChildren(...sets.sets.map(row));
  };
  let sets = { sets: [], current: null };
  redraw = draw;
  const note = make("p", { class: "prefgen-note" }, t("Fetched only when you click, checked by size and SHA-256, into ComfyUI's models folder."));
  modal(t("Model files"), [note, list]).then(() => (redraw = () => {}));
  await draw();
}

function row(set) {
  const running = current?.name === set.name && current.state === "running";
  const about = `${size(set.bytes)}, ${set.licence}`;
  let action;
  if (running) {
    action = make("button", { type: "button", class: "prefgen-button", onclick: () => attempt(() => ask("DELETE", address(set))) }, t("Cancel"));
  } else if (set.missing) {
    const label = set.begun ? t("Go on ({size} to go)", { size: size(set.missing - set.begun) }) : t("Download {size}", { size: size(set.missing) });
    action = make("button", { type: "button", class: "prefgen-button", onclick: () => attempt(() => begin(set)) }, label);
  } else action = make("span", {}, t("is there"));
  const bar = running ? make("progress", { max: String(current.total), value: String(current.done), "aria-label": set.name }) : null;
  return make("article", { "data-set": set.name }, make("div", {}, make("strong", {}, set.name), make("span", { class: "prefgen-note" }, `${set.what} (${about})`), bar), action);
}

async function begin(set) {
  const before = events;
  const answer = await ask("POST", address(set), {});
  if (before === events) current = answer;
  redraw(true);
}

function address(set) {
  return `downloads/${encodeURIComponent(set.name)}`;
}

/** In powers of ten, as model hubs count. */
function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${Math.max(1, Math.round(bytes / 1e6))} MB`;
}
