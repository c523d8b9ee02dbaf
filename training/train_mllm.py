"""Stage 8: teach the MLLM to read a user's history.

    python -m training.train_mllm --config sdxl_24gb

Every sample is a history of a training user (pictures with verdicts) and a question. Losses:
- the answer: cross entropy on its tokens only. Most samples ask the closing question (answer: the whole taste in
  words), the others one of `preference_questions.Questions`;
- reading: linear heads (thrown away) on the top layers' last token name what the user likes and dislikes, where the
  data knows attributes;
- identity: two different histories of one user are closer than histories of different users, by InfoNCE on the last
  token of a middle-to-upper layer (the paper's inter-user discrimination as a training signal);
- contrast: asked whether the user would like one more picture, a liked one pulls more towards "yes" than a
  disliked one.
Vision tower and connector are frozen. The atelier's small language model is trained whole and written as a folder; a
real one gets a LoRA on its decoder, written to `lora/` in the run's folder; FSDP cuts that decoder over the processes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prefgen.atelier.models import MLLM_FOLDER, mllm_tokenizer
from prefgen.compat import has_nf4
from prefgen.files import write_atomic
from prefgen.mllm.files import MLLMError
from prefgen.mllm.model import PreferenceMLLM
from prefgen.precision import DTYPES

from .common import lora
from .common.config.command import StageArgs, arguments
from .common.config.schema import TrainMllm
from .common.errors import exit_with_message
from .common.files import save_weights
from .common.optim import cosine, parameter_groups
from .common.precision import full_precision
from .common.run import Run
from .common.sharded import gather
from .data.errors import DataError
from .data.image_tokens import new_mllm, pool_image_tokens
from .data.preference_questions import NO, YES, Questions, closing, would
from .data.readers import Conversation, Reader
from .data.schema import TEST, TRAIN
from .data.worlds import World, open_world


def core_layer(layers: int) -> int:
    """The middle-to-upper layer that identity is trained on: two thirds up."""
    return layers * 2 // 3


class TasteHeads(nn.Module):
    """Linear readers of the top four layers: liked and disliked attributes. Used in training only."""

    def __init__(self, width: int, attributes: int):
        super().__init__()
        self.read = nn.Linear(4 * width, 2 * attributes)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[B, layers, D] -> [B, 2 * attributes]."""
        top = F.layer_norm(states[:, -4:], states.shape[-1:])
        return self.read(top.flatten(1))


def taste_targets(world: World, users: list[int]) -> torch.Tensor:
    """[B, 2 * attributes]: liked by any taste, then disliked."""
    count = len(world.attributes)
    truth = torch.zeros(len(users), 2 * count)
    for row, user in zip(truth, users, strict=True):
        row[[a for taste in world.tastes(user) for a in taste]] = 1
        row[[count + a for a in world.dislikes(user)]] = 1
    return truth


@full_precision
def identity_loss(once: torch.Tensor, again: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Symmetric InfoNCE between two histories [users, D] each: row i of both is one user."""
    a, b = (F.normalize(F.layer_norm(half, half.shape[-1:]), dim=1) for half in (once, again))
    logits = a @ b.T / temperature
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@full_precision
def answer_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropy over the answers' tokens. logits [tokens, vocabulary], truth [tokens]."""
    return F.cross_entropy(logits, truth, reduction="sum")


@full_precision
def reading_loss(read: TasteHeads, states: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean binary cross entropy of the heads. states [B, layers, D], truth [B, 2 * attributes]."""
    # The positives are rare (about 10 of 98): weigh them up, or the heads first learn to say nothing.
    weight = torch.tensor(4.0, device=truth.device)
    return F.binary_cross_entropy_with_logits(read(states), truth, pos_weight=weight)


@full_precision
def contrast_loss(leaning: torch.Tensor) -> torch.Tensor:
    """Sum of -log sigmoid(liked - disliked). leaning [2 * pairs]: towards "yes", of the liked picture and of the
    disliked one by turns."""
    liked, disliked = leaning.unflatten(0, (-1, 2)).unbind(1)
    return F.softplus(disliked - liked).sum()


def open_mllm(args: StageArgs[TrainMllm], world: World, run: Run) -> tuple[Reader, nn.Module, object]:
    """(reader, what is trained of the MLLM, peft's model or None)."""
    config, device = args.config.mllm, run.accelerator.device
    if config.path is None:
        reader, text = new_atelier(args, world, run)
        run.shard(text, text.layers)
        reader.mllm.model.to(device)
        if device.type == "cpu":  # there SDPA's backward takes 1.6 times as long as plain products'
            reader.mllm.model.set_attn_implementation("eager")
        return reader, text, None
    if config.nf4 and not has_nf4():
        raise MLLMError("mllm.nf4 needs bitsandbytes: install it (pip install bitsandbytes), or set mllm.nf4=false.")
    if config.nf4 and run.uses_fsdp:
        raise MLLMError("FSDP can't cut nf4 weights: set mllm.nf4=false, or launch with DDP.")
    # What will be cut waits on the CPU: a device needs room for its share alone.
    mllm = PreferenceMLLM.load(
        config.path, DTYPES[config.precision], "cpu" if run.uses_fsdp else str(device), None, config.nf4
    )
    mllm.model.requires_grad_(False)
    peft_model = lora.put_on(mllm.model, mllm.family.text, config.lora, args.section.seed)
    run.shard(mllm.family.text, mllm.family.text.layers)
    if not config.nf4:
        mllm.model.to(device)
    if config.gradient_checkpointing:
        mllm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = nn.ParameterDict({n.replace(".", "/"): p for n, p in peft_model.named_parameters() if p.requires_grad})
    return Reader(mllm, world), trained, peft_model


def new_atelier(args: StageArgs[TrainMllm], world: World, run: Run) -> tuple[Reader, nn.Module]:
    """The atelier's MLLM, freshly initialised, with the eyes that the stage before trained."""
    from safetensors.torch import load_file

    model = new_mllm()
    run.warm_start(model, "mllm/model")
    eyes = nn.ModuleDict({"vision": model.model.vision_model, "connector": model.model.connector})
    eyes.load_state_dict(load_file(str(args.runs / "atelier.mllm_vision" / "eyes.safetensors")))
    eyes.requires_grad_(False)
    mllm = PreferenceMLLM(model, mllm_tokenizer(), "atelier", "")
    return Reader(mllm, world, pool_image_tokens(args.runs, world.pool)), model.model.text_model


@dataclass(frozen=True)
class Samples:
    """One step's samples. closing: two histories each of `users` with the closing question; others: other questions;
    pairs: one history with a liked and with a disliked picture, by turns. skipped: users who would have got a pair and
    have no disliked picture."""

    users: list[int]
    closing: list[Conversation]
    others: list[Conversation]
    pairs: list[Conversation]
    skipped: int = 0

    @property
    def all(self) -> list[Conversation]:
        return [*self.closing, *self.others, *self.pairs]

    def share(self, number: int, of: int) -> Samples:
        """One of `of` shares: of a process, and of a piece of its batch. Histories of a user stay together."""
        once, again = np.array_split(np.arange(len(self.closing)), 2)
        mine = [*once[number::of], *again[number::of]]
        pairs = [pair for start in range(2 * number, len(self.pairs), 2 * of) for pair in self.pairs[start : start + 2]]
        closing = [self.closing[i] for i in mine]
        return Samples(self.users[number::of], closing, self.others[number::of], pairs)


def samples_of(
    world: World, questions: Questions, users: list[int], section: TrainMllm, shares: int, rng: np.random.Generator
) -> Samples:
    """The whole batch of a step, the same in every process; it has to be enough for so many shares."""
    count, others, pairs = section.groups
    if count < shares:
        raise DataError(
            f"train_mllm.batch is {section.batch} and holds {count} users, too few for {shares} processes and pieces: "
            "raise it, or lower accumulate."
        )
    chosen = [users[i] for i in rng.choice(len(users), count, replace=len(users) < count)]
    rest = [users[i] for i in rng.choice(len(users), others + pairs, replace=len(users) < others + pairs)]
    # One length a step: padding would be a third of the work. Short histories come less often.
    sizes = [*range(1, section.pictures + 1), section.pictures]
    liked, disliked = int(rng.choice(sizes)), int(rng.choice([0, *sizes[1:]]))
    asked = [closing(world, user, rng, liked, disliked) for user in (*chosen, *chosen)]
    more = [questions.ask(user, rng, liked, disliked) for user in rest[:others]]
    contrasts, skipped = [], 0
    for user in rest[others:]:
        history = world.history(user, rng, liked, max(1, disliked))
        if history.liked.all():  # a liked picture in place of a disliked one would be a wrong answer
            skipped += 1
            continue
        contrasts += [would(world, user, history, rng, verdict) for verdict in (True, False)]
    return Samples(chosen, asked, more, contrasts, skipped)


def losses_of(model, reader: Reader, heads: TasteHeads | None, samples: Samples, tokens: int, piece: int, run, args):
    """{name: loss} of one piece of this process's samples, weighed so that the mean over all pieces is the loss of the
    whole batch, however it is shared out; identity alone compares only the users of a piece, of all processes.

    samples, tokens: the whole batch, and how many tokens its answers have.
    """
    section = args.section
    device, shares = reader.mllm.device, run.world_size * section.accumulate
    mine = samples.share(run.rank * section.accumulate + piece, shares)
    batch = reader.batch(mine.all)
    states, last = reader.forward(batch)
    closing, users = states[: len(mine.closing)], mine.users
    nothing = states.new_zeros(())  # where a share has none of a kind: every process knows the same losses
    losses = dict.fromkeys(("answer", "reading", "identity", "contrast"), nothing)
    head, answered = model.get_output_embeddings(), batch.labels[:, 1:] != -100
    if answered.any():
        said, truth = head(last[:, :-1][answered]), batch.labels[:, 1:][answered]
        losses["answer"] = answer_loss(said, truth) * (shares / tokens)
    if heads is not None and section.reading:
        read = reading_loss(heads, closing, taste_targets(reader.world, users * 2).to(device))
        losses["reading"] = read * (len(users) * shares / len(samples.users))
    if section.identity:
        counts = [len(samples.users[rank * section.accumulate + piece :: shares]) for rank in range(run.world_size)]
        if sum(counts) > 1:
            halves = [run.gather_rows(half, counts) for half in closing[:, core_layer(states.shape[1])].chunk(2)]
            share = sum(counts) * section.accumulate / len(samples.users)
            losses["identity"] = identity_loss(*halves) * share
    if mine.pairs:
        ends = last[torch.arange(len(last), device=device), batch.last][-len(mine.pairs) :]
        losses["contrast"] = contrast_loss(reader.leaning(ends, (YES, NO))) * (2 * shares / len(samples.pairs))
    return losses


def main() -> None:
    args = arguments(TrainMllm, __doc__)
    run = Run(args)
    if run.finished:
        return
    mllm = args.config.mllm
    if mllm.path is not None and mllm.lora is None:
        print(f"mllm.lora is none: {mllm.path} is taken as it is.")
        return run.finish(trained=False)
    train(args, run)


def train(args: StageArgs[TrainMllm], run: Run) -> None:
    section = args.section
    world = open_world(args.config, args.runs)
    users = world.users(TRAIN, section.users)
    questions = Questions(world, args.config.data.questions) if section.others else None
    lacking = sum(not world.has_disliked(user) for user in users) if section.contrast else 0
    if lacking and run.rank == 0:
        helps = " Set train_mllm.contrast=0." if lacking == len(users) else ""
        words = f"{lacking} of {len(users)} users have no disliked picture, and no pair for the contrast loss.{helps}"
        print(f"train_mllm: {words}", file=sys.stderr, flush=True)
    reader, text, peft_model = open_mllm(args, world, run)
    model = reader.mllm.model.train(peft_model is not None)  # LoRA's dropout; the atelier's model has none
    device = reader.mllm.device
    heads = TasteHeads(reader.fingerprint["hidden_size"], len(world.attributes)) if world.attributes else None
    trained = nn.ModuleDict({"text": text} | ({"heads": heads} if heads and section.reading else {})).to(device)
    optimiser = torch.optim.AdamW(parameter_groups(trained, section.weight_decay), betas=(0.9, 0.98))
    trained, optimiser = run.prepare(trained, optimiser)
    run.resume(model=trained, optimiser=optimiser)
    precision = torch.bfloat16 if args.config.mllm.path is None else DTYPES[args.config.mllm.precision]
    shares = run.world_size * section.accumulate
    weights = {"answer": 1.0, "reading": section.reading, "identity": section.identity, "contrast": section.contrast}

    for step in run.steps(section.steps):
        with run.timer("data"):
            samples = samples_of(
                world, questions, users, args.section, shares, np.random.default_rng([section.seed, step])
            )
            tokens = sum(len(reader.answer_ids(asked.answer)) for asked in samples.all)
        means = dict.fromkeys(weights, 0.0)
        for piece in run.micro_batches(np.arange(section.accumulate)):
            with run.timer("forward"), torch.autocast(device.type, precision, enabled=precision != torch.float32):
                losses = losses_of(model, reader, heads, samples, tokens, int(piece[0]), run, args)
            for name, loss in losses.items():
                means[name] += loss.detach() / section.accumulate
            run.backward(sum(weights[name] * loss for name, loss in losses.items()))
        norm = run.update(optimiser, cosine(step, section.steps, section.lr, section.warmup))
        known = {name: mean for name, mean in means.items() if weights[name]}
        known |= {"pairs_skipped": samples.skipped} if lacking else {}
        run.log(loss=run.loss, **known, grad_norm=norm)

    model.eval()
    figures = evaluate(world, reader, heads if section.reading else None, args.section)
    figures |= {"users_without_dislikes": lacking} if lacking else {}
    if peft_model is not None:
        adapter = gather({name: p for name, p in peft_model.named_parameters() if p.requires_grad})
        if run.rank == 0:  # one process writes
            lora.save(peft_model, adapter, run.folder / "lora")
    else:
        state = gather(model.state_dict())
        if run.rank == 0:
            export(model.config, state)
    run.finish(**figures)


def export(config, state: dict[str, torch.Tensor]) -> None:
    """Write the atelier's MLLM as a transformers folder (config.json, model.safetensors) beside its tokenizer."""
    config.architectures = ["SmolVLMForConditionalGeneration"]
    write_atomic(MLLM_FOLDER / "config.json", config.to_json_string(use_diff=True).encode())
    state = {k: v for k, v in state.items() if k != "lm_head.weight"}  # tied to the embedding
    save_weights(state, MLLM_FOLDER / "model.safetensors", {"format": "pt"})


@torch.inference_mode()
def evaluate(
    world: World, reader: Reader, heads: TasteHeads | None, section: TrainMllm, count: int = 256
) -> dict[str, float]:
    """On test users: are liked and disliked attributes ranked first, is a user found again by another history."""
    try:
        users = world.users(TEST, count)
    except DataError:  # a small set has fewer
        users = world.users(TEST)
    rng, states = np.random.default_rng(123), []
    for _ in range(2):
        for start in range(0, len(users), section.batch):
            some = users[start : start + section.batch]
            states.append(
                reader.states([world.history(user, rng, section.pictures, section.pictures) for user in some]).cpu()
            )
    states = torch.cat(states)
    layer = core_layer(states.shape[1])
    a, b = F.normalize(F.layer_norm(states[:, layer], states.shape[-1:]), dim=1).chunk(2)
    found = (a @ b.T).argmax(1) == torch.arange(len(users))
    figures = {"same_user_top1": found.float().mean().item(), "users": len(users)}
    if heads is None:
        return figures
    truth, scores = taste_targets(world, users * 2), heads(states.to(reader.mllm.device)).cpu()
    half = truth.shape[1] // 2
    for name, part in (("liked_precision", slice(0, half)), ("disliked_precision", slice(half, None))):
        hits = [
            truth[i, part][scores[i, part].topk(int(truth[i, part].sum())).indices].mean()
            for i in range(len(truth))
            if truth[i, part].any()
        ]
        if hits:  # of a set whose users dislike nothing there are none
            figures[name] = torch.stack(hits).mean().item()
    return figures


if __name__ == "__main__":
    with exit_with_message():
        main()
