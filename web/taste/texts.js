// What the panel says, in the front end's language: English is the key, other languages are in LANGUAGES.
import { app } from "../../../scripts/app.js";
import { CHINESE } from "./texts.zh.js";

const LANGUAGES = { zh: CHINESE };

/** A text in the language of the front end's settings; {name} in it stands for values.name. */
export function t(english, values = {}) {
  const locale = String(app.extensionManager?.setting?.get?.("Comfy.Locale") ?? navigator.language ?? "en");
  const text = LANGUAGES[locale.split("-")[0]]?.[english] ?? english;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
