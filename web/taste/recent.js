// Pictures that were saved lately: of this page's runs, and what the output folder holds.
import { api } from "../../../scripts/api.js";
import { ask, path, tastes } from "./tastes.js";

const MOST = 400;
const listeners = new Set();

export const recent = {
  pictures: [], // [{filename, subfolder, type}], newest first
  marks: new Map(), // key -> sha256 of what was rated or looked at from here
  differences: new Map(), // key -> how much nearer to what is liked than to what is disliked; near 0 is least sure
  temporary: new Set(), // prompt ids whose previews count as well: those that the Rate view queued

  listen(listener) {
    listeners.add(listener);
    return () => listeners.delete(listener);
  },

  key({ filename, subfolder, type }) {
    return `${type}/${subfolder}/${filename}`;
  },

  source({ filename, subfolder, type }) {
    return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type, preview: "webp;75" })}`);
  },

  /** Read what the output folder holds, newest first. */
  async load() {
    const { pictures } = await ask("GET", "recent");
    add(pictures, true);
    await recent.look();
  },

  /** Ask which of them the open taste holds, and how sure it is of the others. */
  async look() {
    if (!tastes.name || !recent.pictures.length) return;
    const { name } = tastes;
    const asked = [...recent.pictures];
    const { pictures } = await ask("POST", path(name, "/looked_at"), { pictures: asked });
    if (name !== tastes.name) return; // how sure another taste was
    pictures.forEach((seen, number) => {
      const key = recent.key(asked[number]);
      if (seen) recent.marks.set(key, seen.sha256);
      if (seen?.difference == null) recent.differences.delete(key);
      else recent.differences.set(key, seen.difference);
    });
    for (const listener of listeners) listener();
  },

  /** Which of them are rated in the open taste: Map key -> verdict. */
  verdicts() {
    const now = new Map((tastes.open?.pictures ?? []).map((picture) => [picture.sha256, picture.verdict]));
    const known = new Map();
    for (const [key, sha256] of recent.marks) if (now.has(sha256)) known.set(key, now.get(sha256));
    return known;
  },

  /** Note which checksums pictures have that were rated from here, each beside what its verdict changed, or null. */
  async remember(pictures, { moved }) {
    pictures.forEach((picture, number) => moved[number] && recent.marks.set(recent.key(picture), moved[number].sha256));
    for (const listener of listeners) listener();
    // Those that had this verdict already are known by the server.
    if (moved.includes(null)) await recent.look();
  },
};

function add(pictures, behind = false) {
  const there = new Set(recent.pictures.map(recent.key));
  const fresh = pictures.filter((picture) => !there.has(recent.key(picture)));
  recent.pictures = (behind ? [...recent.pictures, ...fresh] : [...fresh, ...recent.pictures]).slice(0, MOST);
  if (fresh.length) for (const listener of listeners) listener();
}

/** What was known under a name that another picture has now. */
function forget({ filename, subfolder = "", type }) {
  const key = recent.key({ filename, subfolder, type });
  recent.marks.delete(key);
  recent.differences.delete(key);
  recent.pictures = recent.pictures.filter((picture) => recent.key(picture) !== key);
}

api.addEventListener("executed", ({ detail }) => {
  const wanted = (type) => type === "output" || recent.temporary.has(detail?.prompt_id);
  const images = (detail?.output?.images ?? []).filter((image) => wanted(image.type) && image.filename);
  images.forEach(forget);
  add(images.map(({ filename, subfolder = "", type }) => ({ filename, subfolder, type })));
});
