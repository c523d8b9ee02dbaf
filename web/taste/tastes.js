// The tastes as the server has them: one place that asks, one that remembers which taste is open, and who wants to know.
import { api } from "../../../scripts/api.js";
import { say } from "./parts.js";
import { t } from "./texts.js";

const OPEN_TASTE = "prefgen.taste"; // in localStorage
const listeners = new Set();

export const tastes = {
  all: [], // [{name, liked, disliked}]
  name: localStorage.getItem(OPEN_TASTE) ?? "",
  open: null, // {name, revision, can_undo, can_redo, pictures}
  multiUser: false,
};

/** Call `listener` after every change, until what this returns is called. */
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** The answer of a route, or an Error with the server's sentence. */
export async function ask(method, path, content, form) {
  const options = { method };
  if (form) options.body = form;
  else if (content !== undefined) {
    options.body = JSON.stringify(content);
    options.headers = { "Content-Type": "application/json" };
  }
  let response;
  try {
    response = await api.fetchApi(`/prefgen/${path}`, options);
  } catch {
    throw new Error(t("ComfyUI doesn't answer: is it still running?"));
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? t("ComfyUI refused this ({status}).", { status: response.status }));
  return answer;
}

/** A taste's path: names may hold any sign. */
export function path(name, rest = "") {
  return `tastes/${encodeURIComponent(name)}${rest}`;
}

export function thumbnail(name, sha256) {
  return api.apiURL(`/prefgen/${path(name, `/thumbnail/${sha256}`)}`);
}

const leaving = new Set(); // names of tastes that this page renames or forgets: that they go is no news

/** Run what takes a taste's name away. */
export async function leave(name, action) {
  leaving.add(name);
  try {
    return await action();
  } catch (error) {
    leaving.delete(name);
    throw error;
  }
}

let begun = 0; // refreshes
let shown = 0; // the one whose answers are there

/** Read everything again and tell all listeners. Answers that come after those to a later question are dropped. */
export async function refresh() {
  const number = ++begun;
  const answer = await ask("GET", "tastes");
  const there = (name) => answer.tastes.some((taste) => taste.name === name);
  const name = there(tastes.name) ? tastes.name : (answer.tastes[0]?.name ?? "");
  const open = name ? await ask("GET", path(name)) : null;
  // Another taste was chosen meanwhile: what is on the way for it follows.
  if (number < shown || (tastes.name !== name && there(tastes.name))) return;
  shown = number;
  const gone = tastes.open?.name === tastes.name && name !== tastes.name && !leaving.has(tastes.name) ? tastes.name : "";
  Object.assign(tastes, { all: answer.tastes, multiUser: answer.multi_user, name, open });
  // Another page renamed or forgot it: whoever goes on rating must know in which taste.
  if (gone && name) say(t("{gone} isn't there any more: {name} is open now.", { gone, name }), "warn");
  tell();
}

function tell() {
  for (const listener of listeners) listener();
}

export async function choose(name) {
  leaving.delete(name);
  tastes.name = name;
  localStorage.setItem(OPEN_TASTE, name);
  // Until its pictures are there none are shown: a key would move another taste's.
  if (tastes.open?.name !== name) tastes.open = null;
  tell();
  await refresh();
}

export async function make(name) {
  const answer = await ask("POST", "tastes", { name });
  await choose(answer.name);
}

/** The open taste's name; asks for one where there is none yet. */
export async function needed() {
  if (!tastes.all.length) await refresh();
  if (!tastes.name) await make(t("My taste"));
  return tastes.name;
}

/** Like or dislike pictures that ComfyUI shows: [{filename, subfolder, type}]. moved: of each, what changed or null. */
export async function rate(pictures, verdict, name) {
  name ??= await needed();
  const moved = [];
  for (const picture of pictures) {
    const answer = await ask("POST", path(name, "/rate"), { ...picture, verdict });
    moved.push(answer.moved[0] ?? null);
  }
  await refresh();
  return { name, moved };
}

/** Rate files from the computer: {added, there, refused}. */
export async function upload(files, verdict, name) {
  name ??= await needed();
  const form = new FormData();
  form.append("verdict", verdict);
  for (const file of files) form.append("file", file, file.name);
  const answer = await ask("POST", path(name, "/upload"), undefined, form);
  await refresh();
  return answer;
}

/** Give pictures of the open taste another verdict; "" moves them to the trash. */
export async function place(pictures, verdict) {
  const answer = await ask("POST", path(tastes.name, "/place"), { pictures, verdict });
  await refresh();
  return answer;
}

export async function undo(again = false, name = tastes.name) {
  await ask("POST", path(name, again ? "/redo" : "/undo"), {});
  await refresh();
}

// Another page, or a file manager and a queue, may have changed a taste.
let waiting = 0;
api.addEventListener("prefgen.taste", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => refresh().catch(() => {}), 60);
});
