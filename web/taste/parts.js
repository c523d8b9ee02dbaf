// Small parts that every view is made of.
import { app } from "../../../scripts/app.js";

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
export function uploaded({ added, there, refused }, verdict) {
  const parts = [`${added} ${verdict}`];
  if (there) parts.push(`${there} there already`);
  if (refused.length) parts.push(`${refused.length} left out: ${refused.map(([name, why]) => `${name} (${why})`).join("; ")}`);
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

/** The picture files of a drop; folders and texts are not among them. */
export function filesOf(event) {
  return [...(event.dataTransfer?.files ?? [])];
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
