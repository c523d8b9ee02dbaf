"""Stage 8: teach the language model to read a user's history.

    python -m training.train_mllm --runs runs/atelier

Every sample is a history of a simulated training user (pictures with verdicts) and a question. Losses, equal weights:
- the answer: cross entropy on its tokens only. Questions: the closing one (answer: the whole taste), one family
  ("which palette does this user like ?"), what the user avoids, whether the user would like one more picture;
- reading: linear heads (thrown away) on the top layers' last token name what the user likes and dislikes;
- identity: two different histories of one user are closer than histories of different users, by InfoNCE on the
  last token of a middle-to-upper layer (the paper's inter-user discrimination as a training signal).
The vision tower and connector are frozen; their tokens come from the previous stage's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prefgen.atelier.attributes import FAMILIES
from prefgen.atelier.models import MLLM_FOLDER, mllm_tokenizer
from prefgen.atelier.users import User
from prefgen.mllm.prompt import CLOSING_QUESTION, render_prompt

from . import core
from .atelier.mllm_vision import new_mllm
from .atelier.pool import PicturePool
from .config.command import arguments
from .users_pool import ATTRIBUTE_INDEX, Dealer, attribute_vector, users_of

SEM_LAYERS = (4, 5, 6, 7)
CORE_LAYER = 5
PHRASES = {(a.family, a.name): a.phrase for values in FAMILIES.values() for a in values}


@dataclass
class Sample:
    """One history with a question: pool indices, verdicts, prompt text, answer text."""

    indices: np.ndarray
    prompt: str
    answer: str


def image_tokens_per_picture(model) -> int:
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size // model.config.scale_factor) ** 2


def taste_answer(person: User) -> str:
    """The whole taste in words: every taste's liked attributes, then what is avoided."""
    liked = " or ".join(", ".join(PHRASES[tuple(p)] for p in taste.liked) for taste in person.tastes)
    return f"likes {liked} ; avoids {', '.join(PHRASES[tuple(p)] for p in person.disliked)}"


def ask(
    person: User,
    dealer: Dealer,
    rng: np.random.Generator,
    per_picture: int,
    closing: bool,
    n_liked: int,
    n_disliked: int,
) -> Sample:
    """Deal one history and one question about it."""
    indices, verdicts = dealer.history(person, n_liked, n_disliked, rng)
    question, answer = CLOSING_QUESTION, taste_answer(person)
    kind = "closing" if closing else rng.choice(["family", "avoid", "picture"])
    if kind == "family":
        family = str(rng.choice(list(FAMILIES)))
        liked = [PHRASES[f, n] for taste in person.tastes for f, n in taste.liked if f == family]
        question = f"Which {family} does this user like ?"
        answer = " or ".join(dict.fromkeys(liked)) if liked else "nothing in particular"
    elif kind == "avoid":
        question = "What does this user avoid ?"
        answer = ", ".join(PHRASES[tuple(p)] for p in person.disliked)
    prompt = render_prompt(verdicts.tolist(), [""] * len(verdicts), question=question, tokens_per_image=per_picture)
    if kind == "picture":
        wanted = bool(rng.integers(2))
        taste = person.tastes[rng.integers(len(person.tastes))]
        extra = dealer.liked(person, taste, 1, rng) if wanted else dealer.disliked(person, 1, rng)
        indices = np.concatenate([indices, extra])
        question = "<image>" * per_picture + " Would this user like this picture ?"
        prompt = render_prompt(verdicts.tolist(), [""] * len(verdicts), question=question, tokens_per_image=per_picture)
        answer = "yes" if wanted else "no"
    return Sample(indices, prompt, answer)


def collate(samples: list[Sample], tokenizer, tokens: torch.Tensor, model):
    """Right-padded batch. Returns (inputs_embeds, attention mask, labels with -100 outside answers, last [B])."""
    prompts = tokenizer([s.prompt for s in samples], add_special_tokens=False).input_ids
    answers = tokenizer([s.answer + "<end_of_utterance>" for s in samples], add_special_tokens=False).input_ids
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(samples), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    embeds = model.get_input_embeddings()(ids)
    places = ids == model.config.image_token_id
    pictures = tokens[np.concatenate([s.indices for s in samples])].float().flatten(0, 1)
    embeds = embeds.masked_scatter(places[..., None], pictures)
    return embeds, (ids != tokenizer.pad_token_id).long(), labels, torch.tensor([len(p) - 1 for p in prompts])


def last_token_states(hidden_states, last: torch.Tensor) -> torch.Tensor:
    """[B, layers, D] at the last prompt token; hidden_states as transformers returns them (embeddings first)."""
    rows = torch.arange(len(last))
    return torch.stack([h[rows, last] for h in hidden_states[1:]], 1).float()


class TasteHeads(nn.Module):
    """Linear readers of the top layers: liked and disliked attributes. Used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.read = nn.Linear(len(SEM_LAYERS) * width, 2 * len(ATTRIBUTE_INDEX))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        top = F.layer_norm(states[:, list(SEM_LAYERS)], states.shape[-1:])
        return self.read(top.flatten(1))


def taste_targets(people: list[User]) -> torch.Tensor:
    """[B, 98]: liked by any taste, then disliked."""
    return torch.from_numpy(
        np.stack(
            [
                np.concatenate(
                    [attribute_vector([p for t in person.tastes for p in t.liked]), attribute_vector(person.disliked)]
                )
                for person in people
            ]
        )
    )


def identity_loss(states: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Symmetric InfoNCE between the two halves of the batch: row i and row i + B/2 are one user."""
    a, b = F.normalize(F.layer_norm(states[:, CORE_LAYER], states.shape[-1:]), dim=1).chunk(2)
    logits = a @ b.T / temperature
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def main() -> None:
    args = arguments("train_mllm", __doc__)
    run = core.Run(args)
    if run.finished:
        return
    from safetensors.torch import load_file

    pool, tokenizer = PicturePool(args.runs), mllm_tokenizer()
    eyes = args.runs / "atelier.mllm_vision"
    tokens = torch.from_numpy(np.load(eyes / "tokens.npy"))
    model = new_mllm()
    run.start(model, "mllm/model")
    nn.ModuleDict({"vision": model.model.vision_model, "connector": model.model.connector}).load_state_dict(
        load_file(str(eyes / "eyes.safetensors"))
    )
    for part in (model.model.vision_model, model.model.connector):
        part.requires_grad_(False)
    text = model.model.text_model
    heads = TasteHeads(text.config.hidden_size)
    trained = nn.ModuleList([text, heads])
    optimiser = torch.optim.AdamW(core.parameter_groups(trained, 0.01), betas=(0.9, 0.98))
    run.resume(model=trained, optimiser=optimiser)
    dealer, people = Dealer(pool.labels[:, 2:]), users_of("train", args.users)
    per_picture = image_tokens_per_picture(model)

    for step in run.steps(args.steps):
        rng = np.random.default_rng([args.seed, step])
        chosen = [people[i] for i in rng.choice(len(people), (args.batch - args.batch // 8) // 2, replace=False)]
        others = [people[i] for i in rng.choice(len(people), args.batch // 8, replace=False)]
        # One length a step: padding would be a third of the work. Short histories come less often.
        n_liked = int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 8]))
        n_disliked = int(rng.choice([0, 2, 3, 4, 5, 6, 7, 8, 8]))
        samples = [
            ask(person, dealer, rng, per_picture, closing, n_liked, n_disliked)
            for people_asked, closing in (((*chosen, *chosen), True), (others, False))
            for person in people_asked
        ]
        embeds, mask, labels, last = collate(samples, tokenizer, tokens, model)
        with torch.autocast("cpu", torch.bfloat16):
            output = text(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True, use_cache=False)
            answered = labels[:, 1:] != -100
            logits = model.lm_head(output.last_hidden_state[:, :-1][answered]).float()
        answer = F.cross_entropy(logits, labels[:, 1:][answered])
        closing = 2 * len(chosen)
        states = last_token_states(output.hidden_states, last)[:closing]
        # The positives are rare (about 10 of 98): weigh them up, or the heads first learn to say nothing.
        reading = F.binary_cross_entropy_with_logits(
            heads(states), taste_targets([*chosen, *chosen]), pos_weight=torch.tensor(4.0)
        )
        identity = identity_loss(states)
        loss = answer + 4 * reading + args.identity * identity
        norm = core.optimise(loss, optimiser, core.cosine(step, args.steps, args.lr, 200))
        run.log(loss=loss, answer=answer, reading=reading, identity=identity, grad_norm=norm)

    model.eval()
    export(model)
    run.finish(**evaluate(model, heads, tokenizer, tokens, dealer, per_picture))


def export(model) -> None:
    """Write the MLLM as a transformers folder (config.json, model.safetensors) beside its tokenizer."""
    model.config.architectures = ["SmolVLMForConditionalGeneration"]
    config = model.config.to_json_string(use_diff=True)
    core.write_atomic(MLLM_FOLDER / "config.json", config.encode())
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied to the embedding
    core.save_weights(state, MLLM_FOLDER / "model.safetensors", {"format": "pt"})


@torch.inference_mode()
def evaluate(model, heads, tokenizer, tokens, dealer, per_picture, count: int = 256) -> dict[str, float]:
    """On test users with 8 + 8 pictures: are liked and disliked attributes ranked first, is the user found again."""
    people = users_of("test", count)
    rng = np.random.default_rng(123)
    states = []
    for _ in range(2):
        for start in range(0, count, 64):
            batch = [ask(p, dealer, rng, per_picture, True, 8, 8) for p in people[start : start + 64]]
            embeds, mask, _, last = collate(batch, tokenizer, tokens, model)
            output = model.model.text_model(
                inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True, use_cache=False
            )
            states.append(last_token_states(output.hidden_states, last))
    states = torch.cat(states)
    truth = taste_targets(people * 2)
    scores = heads(states)
    precision = []
    half = truth.shape[1] // 2
    for part in (slice(0, half), slice(half, None)):
        hits = [
            truth[i, part][scores[i, part].topk(int(truth[i, part].sum())).indices].mean() for i in range(len(truth))
        ]
        precision.append(torch.stack(hits).mean().item())
    a, b = F.normalize(F.layer_norm(states[:, CORE_LAYER], states.shape[-1:]), dim=1).chunk(2)
    found = (a @ b.T).argmax(1) == torch.arange(count)
    return {
        "liked_precision": precision[0],
        "disliked_precision": precision[1],
        "same_user_top1": found.float().mean().item(),
        "users": count,
    }


if __name__ == "__main__":
    main()
