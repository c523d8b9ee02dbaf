"""Stage 8: the MLLM's language model, from nothing, on captions of single pictures.

    python -m training.atelier.world.captioning --runs runs/world

In: image tokens of the pool [n, 16, 192] and captions of its scenes. Out: the MLLM's folder (`mllm/`), a model that
tells what a picture shows and has never read a history: what preference tuning starts from, and the row it is measured
against. The vision tower and the connector stay as they are.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import SmolVLMForConditionalGeneration

from prefgen.atelier.models import MLLM_FOLDER, mllm_config, mllm_tokenizer
from prefgen.atelier.world.prompts import phrases
from prefgen.atelier.world.scenes import Scene
from prefgen.files import write_atomic
from prefgen.mllm.model import PreferenceMLLM

from ...common.config.command import arguments
from ...common.config.world import WorldCaptioning
from ...common.files import save_weights
from ...common.optim import cosine, optimiser_of
from ...common.order import batch_indices
from ...common.run import Run
from ...data.image_tokens import vision_parts
from ...data.readers import Batch, Conversation, Reader
from ...data.world_pool import WorldPool, pool_scene, prompt_of
from ...data.worlds import History

QUESTION = "What does this picture show?"
NO_HISTORY = History(np.empty(0, np.int64), np.empty(0, bool), [])


def main() -> None:
    args = arguments(WorldCaptioning, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = WorldPool(args.runs)
    pool_seed = args.config.atelier.world.pool.seed
    eyes = args.runs / "atelier.world.mllm_vision"
    if not (eyes / "done").exists():
        raise SystemExit("The MLLM sees nothing yet: run `python -m training.atelier.world.mllm_vision` first.")
    model = SmolVLMForConditionalGeneration(mllm_config())
    # On a CPU SDPA's backward takes 1.6 times as long as plain products'.
    model.set_attn_implementation("eager")
    vision = vision_parts(model)
    vision.load_state_dict(load_file(str(eyes / "eyes.safetensors")))
    vision.requires_grad_(False)
    tokens = np.load(eyes / "tokens.npy", mmap_mode="r")
    reader = Reader(PreferenceMLLM(model, mllm_tokenizer(), "atelier", ""), None, tokens)
    text = model.model.text_model
    optimiser = optimiser_of(section.optimiser, text, 0.01, (0.9, 0.98))
    run.resume(model=text, optimiser=optimiser)

    for step in run.steps(section.steps):
        chosen = batch_indices(section.seed, step, section.batch, pool.train_count)
        rng = np.random.default_rng([section.seed, step])
        with run.timer("data"):
            conversations = [asked(i, answer(pool_scene(pool_seed, i), rng)) for i in chosen]
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            loss, share = caption_loss(reader, reader.batch(conversations))
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, 200))
        run.log(loss=loss, right=share, grad_norm=norm)

    model.eval()
    figures = evaluate(reader, pool, pool_seed, section.batch)
    model.config.architectures = ["SmolVLMForConditionalGeneration"]
    write_atomic(MLLM_FOLDER / "config.json", model.config.to_json_string(use_diff=True).encode())
    # The head is tied to the embedding, so transformers needs no copy of it.
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_weights(state, MLLM_FOLDER / "model.safetensors", {"format": "pt"})
    run.finish(**figures)


def answer(scene: Scene, rng: np.random.Generator) -> str:
    """What a scene shows: its prompt, then every phrase in an order of its own. Only what is there is said, and all of
    it: an answer of varying length would be guessed, not read."""
    look = list(phrases(scene).values())
    rng.shuffle(look)
    return ", ".join([prompt_of(scene).text, *look])


def asked(picture: int, words: str) -> Conversation:
    """One picture of the pool, the question, and its answer."""
    return Conversation(NO_HISTORY, QUESTION, words, np.array([picture]))


def caption_loss(reader: Reader, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean cross entropy of the answers' tokens, share of them that are the likeliest)."""
    _, last_states = reader.forward(batch)
    # The state at one token predicts the next.
    answered = batch.labels[:, 1:] != -100
    logits = reader.mllm.model.get_output_embeddings()(last_states[:, :-1][answered]).float()
    truth = batch.labels[:, 1:][answered]
    return torch.nn.functional.cross_entropy(logits, truth), (logits.argmax(1) == truth).float().mean()


@torch.inference_mode()
def evaluate(reader: Reader, pool: WorldPool, pool_seed: int, batch: int, count: int = 512) -> dict[str, float]:
    """The loss, and the share of tokens guessed right, on captions of unseen pictures."""
    rng = np.random.default_rng(0)
    first = pool.train_count
    losses = []
    shares = []
    for start in range(first, min(first + count, len(pool)), batch):
        numbers = range(start, min(start + batch, len(pool)))
        conversations = [asked(i, answer(pool_scene(pool_seed, i), rng)) for i in numbers]
        loss, share = caption_loss(reader, reader.batch(conversations))
        losses.append(loss.item())
        shares.append(share.item())
    return {"unseen_loss": float(np.mean(losses)), "unseen_right": float(np.mean(shares))}


if __name__ == "__main__":
    main()
