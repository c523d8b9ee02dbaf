// Graphs that the panel queues. No model runs in the browser or behind a route: whatever needs one waits its turn here.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { t } from "./texts.js";

const SEEDS = ["seed", "noise_seed"];
const LARGEST_SEED = 2 ** 50; // below what a number in JavaScript holds exactly
const IMAGES = ["SaveImage", "PreviewImage"];

/** Queue a graph behind what waits already; its prompt id. Throws an Error with ComfyUI's own sentence. */
export async function queue(prompt, workflow) {
  const content = { client_id: api.clientId, prompt, extra_data: workflow ? { extra_pnginfo: { workflow } } : {} };
  const response = await api.fetchApi("/prompt", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(reason(answer));
  return answer.prompt_id;
}

function reason({ error, node_errors: nodes }) {
  const first = Object.values(nodes ?? {})[0];
  const fault = first?.errors?.[0] ?? error ?? {};
  const words = [fault.message, fault.details].filter(Boolean).join(": ");
  return first ? `${first.class_type}: ${words}` : words || t("ComfyUI refused the graph.");
}

/** Queue the open workflow so many times, each with new seeds; the prompt ids. The workflow itself stays as it is. */
export async function makePictures(count) {
  const ids = [];
  for (let number = 0; number < count; number++) {
    const restore = newSeeds();
    let graph;
    try {
      graph = await app.graphToPrompt();
    } finally {
      restore();
    }
    if (!Object.values(graph.output).some((node) => IMAGES.includes(node.class_type))) {
      throw new Error(t("The open workflow saves no picture: open one with Save Image or Preview Image."));
    }
    ids.push(await queue(graph.output, graph.workflow));
  }
  return ids;
}

/** Give every sampler of the open workflow another seed; what is returned gives the old ones back. */
function newSeeds() {
  const before = [];
  for (const node of nodesOf(app.graph)) {
    for (const widget of node.widgets ?? []) {
      const linked = node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
      if (!SEEDS.includes(widget.name) || typeof widget.value !== "number" || linked) continue;
      before.push([widget, widget.value]);
      widget.value = Math.floor(Math.random() * Math.min(widget.options?.max ?? LARGEST_SEED, LARGEST_SEED));
    }
  }
  if (!before.length) throw new Error(t("The open workflow has no seed to change."));
  return () => before.forEach(([widget, value]) => (widget.value = value));
}

function* nodesOf(graph) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* nodesOf(node.subgraph);
  }
}

/** Queue a look at a taste's pictures and at others; the prompt id, or null where there is no CLIP vision model. */
export async function lookAt(taste, pictures) {
  const encoder = await sourceOf({ CLIPVisionLoader: 0, PrefGen_LoadAtelier: 3 }, "CLIPVisionLoader", "clip_name");
  if (!encoder) return null;
  const inputs = { clip_vision: ["prefgen_encoder", encoder.slot], taste, pictures: JSON.stringify(pictures) };
  return queue({ prefgen_encoder: encoder.node, prefgen_look: { class_type: "PrefGen_LookAtPictures", inputs } });
}

/** Queue a description of a taste by the MLLM; the prompt id, or null where there is none. */
export async function describe(taste) {
  const mllm = await sourceOf({ PrefGen_LoadPreferenceMLLM: 0 }, "PrefGen_LoadPreferenceMLLM", "mllm");
  if (!mllm) return null;
  const history = { class_type: "PrefGen_LoadPreferenceHistory", inputs: { history: taste } };
  const inputs = { mllm: ["prefgen_mllm", mllm.slot], liked: ["prefgen_history", 0], taste };
  if (await hasDisliked(taste)) inputs.disliked = ["prefgen_history", 1];
  const words = { class_type: "PrefGen_DescribePreference", inputs };
  const shown = { class_type: "PreviewAny", inputs: { source: ["prefgen_words", 2] } };
  return queue({ prefgen_mllm: mllm.node, prefgen_history: history, prefgen_words: words, prefgen_shown: shown });
}

async function hasDisliked(name) {
  const answer = await (await api.fetchApi("/prefgen/tastes")).json();
  return answer.tastes.some((taste) => taste.name === name && taste.disliked);
}

/** The node that gives a model: that of the open workflow, else one with what is there; null for none.
 *  kinds: {class: output slot}. Bundled models of the drawn world come last: they know nothing else. */
async function sourceOf(kinds, loader, widget) {
  const open = (await app.graphToPrompt().catch(() => ({ output: {} }))).output;
  const used = Object.values(open).find((node) => node.class_type in kinds && !Object.values(node.inputs).some(Array.isArray));
  if (used) return { node: { class_type: used.class_type, inputs: used.inputs }, slot: kinds[used.class_type] };
  const [schema] = Object.values(await (await api.fetchApi(`/object_info/${loader}`)).json());
  const required = Object.entries(schema?.input?.required ?? {});
  const inputs = Object.fromEntries(required.map(([name, spec]) => [name, preset(spec)]));
  const choices = optionsOf(schema?.input?.required?.[widget]);
  inputs[widget] = choices.find((choice) => choice !== "atelier") ?? choices[0];
  return inputs[widget] === undefined ? null : { node: { class_type: loader, inputs }, slot: kinds[loader] };
}

/** The options of a combo in either way that ComfyUI writes them. */
function optionsOf(spec) {
  return Array.isArray(spec?.[0]) ? spec[0] : (spec?.[1]?.options ?? []);
}

function preset(spec) {
  return spec[1]?.default ?? optionsOf(spec)[0];
}
