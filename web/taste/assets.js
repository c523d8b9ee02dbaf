// Import by the tags of ComfyUI's own assets, over its HTTP API; only where it runs with --enable-assets.
import { api } from "../../../scripts/api.js";
import { make, modal } from "./parts.js";
import { t } from "./texts.js";
import { tastes, upload } from "./tastes.js";

const PAGE = 100;
const MOST = 2000; // pictures of a tag
const PLACES = ["input", "output", "temp", "models"]; // tags of core's own that say where a file lies

/** Whether this ComfyUI has assets. */
export async function hasAssets() {
  const response = await api.fetchApi("/assets?limit=1").catch(() => null);
  const json = response?.ok && (response.headers.get("content-type") ?? "").includes("json");
  return Boolean(json && Array.isArray((await response.json()).assets));
}

/** Ask which tag means liked and which disliked, and import both: {added, there, refused}; null where nothing is chosen. */
export async function importByTags() {
  const taste = tastes.name; // whichever is open when the last page comes
  const answer = await (await api.fetchApi("/tags?limit=500")).json();
  const names = answer.tags.map((tag) => tag.name).filter((name) => !PLACES.includes(name));
  if (!names.length) throw new Error(t("No asset has a tag: give them tags in ComfyUI's assets first."));
  const pick = (label, wanted) =>
    make("label", {}, make("span", {}, label), make("select", {}, make("option", { value: "" }, "–"), ...names.map((name) => make("option", { value: name, selected: wanted.includes(name.toLowerCase()) }, name))));
  const sides = { liked: pick(t("Liked are those tagged"), ["liked", "like", "favorite", "favourite"]), disliked: pick(t("Disliked are those tagged"), ["disliked", "dislike", "rejected"]) };
  if (!(await modal(t("Import by tags"), [sides.liked, sides.disliked], t("Import")))) return null;
  const done = { added: 0, there: 0, refused: [] };
  for (const [verdict, label] of Object.entries(sides)) {
    const tag = label.querySelector("select").value;
    for await (const files of tag ? pages(tag, done.refused) : []) {
      const { added, there, refused } = await upload(files, verdict, taste);
      done.added += added;
      done.there += there;
      done.refused.push(...refused);
    }
  }
  return done;
}

/** The pictures of a tag as files, a page at a time, oldest first: a verdict's time is that of the import. What doesn't
 *  come is added to `refused`. */
async function* pages(tag, refused) {
  for (let offset = 0; offset < MOST; offset += PAGE) {
    const words = new URLSearchParams({ include_tags: tag, limit: PAGE, offset, sort: "created_at", order: "asc" });
    const answer = await (await api.fetchApi(`/assets?${words}`)).json();
    const pictures = answer.assets.filter((asset) => (asset.mime_type ?? "image/").startsWith("image/"));
    const files = [];
    for (const { id, display_name: shown, name } of pictures) {
      const response = await api.fetchApi(`/assets/${id}/content`);
      if (response.ok) files.push(new File([await response.blob()], shown ?? name));
      else refused.push([shown ?? name, t("ComfyUI refused this ({status}).", { status: response.status })]);
    }
    if (files.length) yield files;
    if (!answer.has_more) return;
  }
  refused.push([tag, t("only its first {n} pictures came in", { n: MOST })]);
}
