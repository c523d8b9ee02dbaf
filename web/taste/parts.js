// Small parts that every view is made of.
import { app } from "../../../scripts/app.js";
import { t } from "./texts.js";

/** An element: make("button", {class: "x", onclick}, child, "text"). */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A button with an icon and a name that is read aloud. */
export function iconButton(icon, label, onclick, attributes = {}) {
  const sign = make("i", { class: `pi ${icon}`, "aria-hidden": "true" });
  return make("button", { type: "button", class: "prefgen-button", title: label, "aria-label": label, onclick, ...attributes }, sign);
}

/** A message that goes by itself: one that stays covers Run. */
export function say(detail, severity = "info", summary = "PrefGen") {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: severity === "error" ? 9000 : 4000 });
}

/** Run what may fail and show the sentence where it does. */
export async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    say(error.message, "error");
    return undefined;
  }
}

/** What an upload did, in one sentence. */
export function uploaded({ added, there, refused }, summary) {
  const parts = [`${summary}: ${added}`];
  if (there) parts.push(t("{n} there already", { n: there }));
  if (refused.length) {
    const files = refused.map(([name, why]) => `${name} (${why})`).join("; ");
    parts.push(t("{n} left out: {files}", { n: refused.length, files }));
  }
  say(parts.join(", "), refused.length ? "warn" : "success");
}

export async function askForText(title, message, value = "") {
  const dialog = app.extensionManager?.dialog;
  if (dialog?.prompt) return (await dialog.prompt({ title, message, defaultValue: value }))?.trim();
  return window.prompt(message, value)?.trim();
}

export async function confirm(title, message) {
  const dialog = app.extensionManager?.dialog;
  if (dialog?.confirm) return await dialog.confirm({ title, message, type: "delete" });
  return window.confirm(message);
}

/** A window over the page; true where it was left by the button `accept`, false where it was closed. */
export function modal(title, content, accept = "") {
  const close = iconButton("pi-times", t("Close (Esc)"), () => dialog.close());
  const button = accept ? make("button", { type: "button", class: "prefgen-button", onclick: () => dialog.close("accept") }, accept) : null;
  const dialog = make("dialog", { class: "prefgen-dialog", "aria-label": title }, make("header", {}, make("h2", {}, title), close), ...content, button);
  dialog.addEventListener("keydown", (event) => event.stopPropagation()); // ComfyUI's own keys stay out
  // Before ComfyUI, which takes Escape for itself where what had the focus was drawn anew.
  const escape = (event) => {
    if (event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    dialog.close();
  };
  window.addEventListener("keydown", escape, true);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => {
      window.removeEventListener("keydown", escape, true);
      dialog.remove();
      resolve(dialog.returnValue === "accept");
    }),
  );
}

/** The files of a drop, those of dropped folders as well, each with the path that it has in them. */
export async function filesOf(event) {
  // Before anything is waited for: afterwards the browser has emptied the list.
  const entries = [...(event.dataTransfer?.items ?? [])].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const plain = [...(event.dataTransfer?.files ?? [])];
  if (!entries.some((entry) => entry.isDirectory)) return plain;
  return (await Promise.all(entries.map(filesBelow))).flat();
}

async function filesBelow(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [Object.assign(file, { path: entry.fullPath })];
  }
  const reader = entry.createReader();
  const files = [];
  for (;;) {
    const inner = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!inner.length) return files;
    for (const each of inner) files.push(...(await filesBelow(each)));
  }
}

/** Pictures of ComfyUI's own that a drop carries: from the assets panel, or an <img> of this server. */
export function viewsOf(event) {
  const data = event.dataTransfer;
  const asset = data?.getData("application/x-comfy-asset-info");
  if (asset) {
    try {
      const { filename, subfolder = "", type = "output" } = JSON.parse(asset);
      return filename ? [{ filename, subfolder, type }] : [];
    } catch {
      return [];
    }
  }
  return (data?.getData("text/uri-list") ?? "").split("\n").map(viewOf).filter(Boolean);
}

/** {filename, subfolder, type} of the address of a picture that this server shows, else null. */
export function viewOf(address) {
  let url;
  try {
    url = new URL(address.trim(), location.href);
  } catch {
    return null;
  }
  const filename = url.searchParams.get("filename");
  if (url.host !== location.host || !url.pathname.endsWith("/view") || !filename) return null;
  return { filename, subfolder: url.searchParams.get("subfolder") ?? "", type: url.searchParams.get("type") ?? "output" };
}
