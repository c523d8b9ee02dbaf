"""Stage 8: teach the MLLM to read a user's history.

    python -m training.train_mllm --config sdxl_24gb

In: histories of training users (pictures with verdicts, prompts where the data has them), each with a question. Out:
the MLLM whose H [layers, D] the next stage extracts. The atelier's small language model is trained whole and written as
a folder; a real one gets a LoRA on its decoder, written to `lora/` in the run's folder. Vision tower and connector are
frozen; FSDP shards the decoder over the processes.

The paper (arXiv 2512.06020) fine-tunes an MLLM on preference questions over several pictures, and tells layers by two
tasks: which user a history belongs to, and whether the user likes a picture. Losses:
- answer: cross entropy on the answer's tokens alone. Most conversations end on the closing question (answer: the whole
  taste in words), the others on one of `preference_questions.Questions`;
- contrast: asked whether the user would like one more picture, a liked one pulls more towards "yes" than a disliked
  one. The intra-user task as a training signal;
- identity: two different histories of one user are closer than histories of different users, by InfoNCE on the last
  token of a middle-to-upper layer. The inter-user task as a training signal, and ours;
- reading: linear heads (thrown away) on the top layers' last token name what the user likes and dislikes, where the
  data knows attributes. Ours, with the largest weight of all: see docs/departures.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from prefgen.atelier.models import MLLM_FOLDER, mllm_tokenizer
from prefgen.compat import has_nf4
from prefgen.dtypes import DTYPES
from prefgen.files import write_atomic
from prefgen.mllm.files import MLLMError
from prefgen.mllm.model import PreferenceMLLM

from .common import lora
from .common.ahead import Ahead
from .common.captioning import captioning_folder
from .common.chain import made_of
from .common.config.command import StageArgs, arguments
from .common.config.schema import TrainMllm
from .common.errors import exit_with_message
from .common.files import save_weights
from .common.optim import cosine, optimiser_of
from .common.precision import full_precision
from .common.run import Run
from .common.sharded import gather
from .data.errors import DataError
from .data.history_shapes import drawn_length, drop_prompts, without_prompts
from .data.image_tokens import new_mllm, pool_image_tokens, vision_parts
from .data.open_world import open_world
from .data.preference_questions import NO, YES, Questions, closing, would
from .data.readers import Conversation, Reader, data_set_tokens
from .data.schema import TEST, TRAIN
from .data.taste_heads import TasteHeads, new_heads, precision_at_k, reading_loss, taste_targets
from .data.worlds import AtelierWorld, World
from .evaluation.vqa_score import share_right

# What must be right of preference questions at `gate_step`, and of how many they are.
GATE = 0.75
GATE_USERS = 100
GATE_QUESTIONS = 4
HELDOUT_SEED = 321


def main() -> None:
    args = arguments(TrainMllm, __doc__)
    section = args.section
    world = open_world(args.config, args.runs)
    run = Run(args, made_of=made_of(args.config, args.runs, args.stage, world.digest))
    if run.finished:
        return
    if args.config.mllm.path is not None and args.config.mllm.lora is None:
        print(f"mllm.lora is none: {args.config.mllm.path} is used as it is.")
        return run.finish(trained=False)
    users = world.users(TRAIN, section.users)
    questions = Questions(world, args.config.data.questions) if section.others else None
    without_dislikes = count_without_dislikes(world, users, section, quiet=run.rank > 0)
    reader, text, peft_model = open_mllm(args, world, run)
    # For LoRA's dropout; the atelier's model has none.
    model = reader.mllm.model.train(peft_model is not None)
    device = reader.mllm.device
    heads = new_heads(reader, world, section.reading)
    trained = nn.ModuleDict({"text": text})
    if heads is not None:
        trained["heads"] = heads
    optimiser = optimiser_of(section.optimiser, trained.to(device), section.weight_decay, (0.9, 0.98))
    trained, optimiser = run.prepare(trained, optimiser)
    run.resume(model=trained, optimiser=optimiser)
    dtype = torch.bfloat16 if args.config.mllm.path is None else DTYPES[args.config.mllm.precision]
    batches = Ahead(
        lambda step: drawn(world, questions, users, section, run, step, reader.tokens is None),
        lambda step: step + 1 if step + 1 < section.steps else None,
    )
    weights = {"answer": 1.0, "reading": section.reading, "identity": section.identity, "contrast": section.contrast}

    for step in run.steps(section.steps):
        with run.timer("data"):
            samples, world.prefetched = batches(step)
            answer_tokens = sum(len(reader.answer_ids(sample.answer)) for sample in samples.all)
        means = dict.fromkeys(weights, 0.0)
        for (number,) in run.micro_batches(range(section.accumulate)):
            with run.timer("forward"), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = losses_of(reader, heads, samples, answer_tokens, number, run, section)
            for name, loss in losses.items():
                means[name] += loss.detach() / section.accumulate
            run.backward(sum(weights[name] * loss for name, loss in losses.items()))
        norm = run.update(optimiser, cosine(step, section.steps, section.lr, section.warmup))
        figures = {name: mean for name, mean in means.items() if weights[name]}
        if without_dislikes:
            figures["pairs_skipped"] = samples.skipped
        run.log(loss=run.loss, **figures, grad_norm=norm)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            log_heldout(world, reader, heads, model, run, section)
        check_gate(args, run, reader)

    model.eval()
    figures = evaluate(world, reader, heads, section)
    if without_dislikes:
        figures["users_without_dislikes"] = without_dislikes
    export(run, model, peft_model)
    run.finish(**figures)


@torch.no_grad()
def log_heldout(
    world: World, reader: Reader, heads: TasteHeads | None, model: nn.Module, run: Run, section: TrainMllm
) -> None:
    """Every `heldout_every` steps the losses of one batch of test users' histories, the same each time, as heldout_NAME
    in the log. All processes have to call it: each reads its share."""
    if not section.heldout_every or (run.step + 1) % section.heldout_every:
        return
    shares = run.world_size * section.accumulate
    rng = np.random.default_rng(HELDOUT_SEED)
    samples = samples_of(world, None, some_test_users(world), section, shares, rng)
    answer_tokens = sum(len(reader.answer_ids(sample.answer)) for sample in samples.all)
    is_training = model.training
    model.eval()
    numbers = range(section.accumulate)
    with run.timer("heldout"):
        pieces = [losses_of(reader, heads, samples, answer_tokens, number, run, section) for number in numbers]
    model.train(is_training)
    means = torch.stack([torch.stack([piece[name].float() for piece in pieces]).mean() for name in pieces[0]])
    if run.world_size > 1:
        means = run.accelerator.reduce(means, "mean")
    run.log_figures(**{f"heldout_{name}": mean for name, mean in zip(pieces[0], means.tolist(), strict=True)})


def some_test_users(world: World, count: int = 256) -> list[int]:
    """So many test users, or all of a small set."""
    try:
        return world.users(TEST, count)
    except DataError:
        return world.users(TEST)


def check_gate(args: StageArgs[TrainMllm], run: Run, reader: Reader) -> None:
    """At `gate_step`, SystemExit where the MLLM answers too few of the test users' closed questions: nothing that is
    trained on its states would know its users."""
    if run.step + 1 != args.section.gate_step:
        return
    right = share_right(reader, args.config, GATE_USERS, GATE_QUESTIONS, args.section.batch)
    run.log_figures(gate_right=right)
    if right < GATE:
        run.stop(
            f"{args.stage}: after {args.section.gate_step} steps the MLLM answers {right:.2f} of preference questions "
            f"rightly, not {GATE}: begin with histories of one picture each, or train its vision tower longer. The "
            "same command trains on all the same."
        )


def count_without_dislikes(world: World, users: list[int], section: TrainMllm, quiet: bool) -> int:
    """How many users have no disliked picture, where the contrast loss would need one; said once."""
    if not section.contrast:
        return 0
    count = sum(not world.has_disliked(user) for user in users)
    if count and not quiet:
        advice = " Set train_mllm.contrast=0." if count == len(users) else ""
        words = f"{count} of {len(users)} users have no disliked picture, and no pair for the contrast loss.{advice}"
        print(f"train_mllm: {words}", file=sys.stderr, flush=True)
    return count


def open_mllm(args: StageArgs[TrainMllm], world: World, run: Run) -> tuple[Reader, nn.Module, object]:
    """(reader, what is trained of the MLLM, peft's model or None)."""
    config = args.config.mllm
    device = run.accelerator.device
    if config.path is None:
        reader, text = new_atelier(args, world, run)
        run.shard(text, text.layers)
        reader.mllm.model.to(device)
        # On a CPU SDPA's backward takes 1.6 times as long as plain products'.
        if device.type == "cpu":
            reader.mllm.model.set_attn_implementation("eager")
        return reader, text, None
    if config.nf4 and not has_nf4():
        raise MLLMError("mllm.nf4 needs bitsandbytes: install it (pip install bitsandbytes), or set mllm.nf4=false.")
    if config.nf4 and run.uses_fsdp:
        raise MLLMError("FSDP can't cut nf4 weights: set mllm.nf4=false, or launch with DDP.")
    # What will be sharded waits on the CPU: a device needs room for its share alone.
    load_to = "cpu" if run.uses_fsdp else str(device)
    mllm = PreferenceMLLM.load(config.path, DTYPES[config.precision], load_to, None, config.nf4)
    mllm.model.requires_grad_(False)
    peft_model = lora.put_on(mllm.model, mllm.family.text, config.lora, args.section.seed)
    run.shard(mllm.family.text, mllm.family.text.layers)
    if not config.nf4:
        mllm.model.to(device)
    if config.gradient_checkpointing:
        mllm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = data_set_tokens(args, world, mllm, run.rank, run.world_size)
    return Reader(mllm, world, tokens), nn.ParameterDict(lora_weights(peft_model, separator="/")), peft_model


def new_atelier(args: StageArgs[TrainMllm], world: World, run: Run) -> tuple[Reader, nn.Module]:
    """The atelier's MLLM as the stage before left it: of the second edition one that captions pictures, of the first
    freshly initialised, with a trained vision tower and connector."""
    if not isinstance(world, AtelierWorld):
        mllm = PreferenceMLLM.load(captioning_folder(args.runs))
        vision_parts(mllm.model).requires_grad_(False)
        tokens = data_set_tokens(args, world, mllm, run.rank, run.world_size)
        return Reader(mllm, world, tokens), mllm.model.model.text_model
    model = new_mllm()
    run.warm_start(model, "mllm/model")
    vision = vision_parts(model)
    vision.load_state_dict(load_file(str(args.runs / "atelier.mllm_vision" / "eyes.safetensors")))
    vision.requires_grad_(False)
    mllm = PreferenceMLLM(model, mllm_tokenizer(), "atelier", "")
    return Reader(mllm, world, pool_image_tokens(args.runs, world.pool)), model.model.text_model


def lora_weights(peft_model, separator: str = ".") -> dict[str, nn.Parameter]:
    """The trained weights by their names in the model, whose parts are joined by `separator`."""
    named = peft_model.named_parameters()
    return {name.replace(".", separator): weight for name, weight in named if weight.requires_grad}


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

    def share(self, number: int, shares: int) -> Samples:
        """One of so many shares: a micro-batch of a process. Both histories of a user stay together, and both pictures
        of a pair."""
        count = len(self.users)
        closing = [*self.closing[:count][number::shares], *self.closing[count:][number::shares]]
        starts = range(2 * number, len(self.pairs), 2 * shares)
        pairs = [pair for start in starts for pair in self.pairs[start : start + 2]]
        return Samples(self.users[number::shares], closing, self.others[number::shares], pairs)


def drawn(
    world: World, questions: Questions | None, users: list[int], section: TrainMllm, run: Run, step: int, decode: bool
) -> tuple[Samples, dict[int, np.ndarray]]:
    """A step's samples, and the pictures of this process's share of them, where they have to be decoded."""
    rng = np.random.default_rng([section.seed, step])
    # Every process draws the whole batch and takes its shares of it.
    shares = run.world_size * section.accumulate
    samples = samples_of(world, questions, users, section, shares, rng)
    if not decode:
        return samples, {}
    own = [samples.share(run.rank * section.accumulate + number, shares) for number in range(section.accumulate)]
    pictures = [np.concatenate([c.history.pictures, c.shown]) for share in own for c in share.all]
    return samples, world.decoded(np.unique(np.concatenate(pictures)).astype(np.int64))


def samples_of(
    world: World,
    questions: Questions | None,
    users: list[int],
    section: TrainMllm,
    shares: int,
    rng: np.random.Generator,
) -> Samples:
    """The whole batch of a step, the same in every process; it has to be enough for so many shares. questions: of the
    others, which there are none of without."""
    count, others, pairs = section.groups
    if count < shares:
        raise DataError(
            f"train_mllm.batch is {section.batch} and holds {count} users, too few for {shares} processes and pieces: "
            "raise it, or lower accumulate."
        )
    chosen = [users[i] for i in rng.choice(len(users), count, replace=len(users) < count)]
    rest = [users[i] for i in rng.choice(len(users), others + pairs, replace=len(users) < others + pairs)]
    # One length a step: padding would be a third of the work.
    if section.short:
        liked, disliked = (drawn_length(rng, section.pictures, section.short) for _ in range(2))
    else:
        # Short histories come less often.
        sizes = [*range(1, section.pictures + 1), section.pictures]
        liked = int(rng.choice(sizes))
        disliked = int(rng.choice([0, *sizes[1:]]))
    conversations = [closing(world, user, rng, liked, disliked) for user in (*chosen, *chosen)]
    asked = [questions.ask(user, rng, liked, disliked) for user in rest[:others]] if questions else []
    contrasts: list[Conversation] = []
    skipped = 0
    hidden = world.drop_prompts
    for user in rest[others:]:
        history = world.history(user, rng, liked, max(1, disliked))
        # A liked picture in place of a disliked one would be a wrong answer.
        if history.liked.all():
            skipped += 1
            continue
        # Both pictures of a pair are asked about in the same words.
        if hidden and rng.random() < hidden:
            history = without_prompts(history)
        contrasts += [would(world, user, history, rng, verdict) for verdict in (True, False)]
    conversations = drop_prompts(conversations, hidden, rng)
    return Samples(chosen, conversations, drop_prompts(asked, hidden, rng), contrasts, skipped)


def losses_of(
    reader: Reader,
    heads: TasteHeads | None,
    samples: Samples,
    answer_tokens: int,
    number: int,
    run: Run,
    section: TrainMllm,
) -> dict[str, torch.Tensor]:
    """{name: loss} of one micro-batch of this process, weighed so that the mean over all micro-batches and processes is
    the loss of the whole batch; identity alone compares only the users of a micro-batch, of all processes.

    samples, answer_tokens: the whole batch, and how many tokens its answers have.
    """
    shares = run.world_size * section.accumulate
    own = samples.share(run.rank * section.accumulate + number, shares)
    batch = reader.batch(own.all)
    states, last_states = reader.forward(batch)
    closing_states = states[: len(own.closing)]
    # Zeros where a share has none of a kind: every process has to know the same losses.
    losses = dict.fromkeys(("answer", "reading", "identity", "contrast"), states.new_zeros(()))
    # The state at one token predicts the next.
    answered = batch.labels[:, 1:] != -100
    if answered.any():
        logits = reader.mllm.model.get_output_embeddings()(last_states[:, :-1][answered])
        losses["answer"] = answer_loss(logits, batch.labels[:, 1:][answered]) * (shares / answer_tokens)
    if heads is not None:
        truth = taste_targets(reader.world, own.users * 2).to(closing_states.device)
        losses["reading"] = reading_loss(heads, closing_states, truth) * (len(own.users) * shares / len(samples.users))
    # How many users this micro-batch has in each process.
    counts = [len(samples.users[rank * section.accumulate + number :: shares]) for rank in range(run.world_size)]
    if section.identity and sum(counts) > 1:
        halves = closing_states[:, core_layer(states.shape[1])].chunk(2)
        # InfoNCE tells a user from all others there are, so every process compares with all rows.
        once, again = (run.gather_rows(half, counts) for half in halves)
        losses["identity"] = identity_loss(once, again) * (sum(counts) * section.accumulate / len(samples.users))
    if own.pairs:
        rows = torch.arange(len(last_states), device=last_states.device)
        ends = last_states[rows, batch.last][-len(own.pairs) :]
        losses["contrast"] = contrast_loss(reader.leaning(ends, (YES, NO))) * (2 * shares / len(samples.pairs))
    return losses


@full_precision
def answer_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropy over the answers' tokens. logits [tokens, vocabulary], truth [tokens]."""
    return F.cross_entropy(logits, truth, reduction="sum")


@full_precision
def contrast_loss(leaning: torch.Tensor) -> torch.Tensor:
    """Sum of -log sigmoid(liked - disliked). leaning [2 * pairs]: towards "yes", of the liked picture and of the
    disliked one by turns."""
    # Learning answers alone leaves the MLLM's own "yes" at chance (0.514), although a linear probe reads it off the
    # states in 0.927 (docs/evidence/notes.md).
    liked, disliked = leaning.unflatten(0, (-1, 2)).unbind(1)
    return F.softplus(disliked - liked).sum()


@full_precision
def identity_loss(once: torch.Tensor, again: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Symmetric InfoNCE between two histories [users, D] each: row i of both is one user."""
    a, b = (F.normalize(F.layer_norm(half, half.shape[-1:]), dim=1) for half in (once, again))
    logits = a @ b.T / temperature
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def core_layer(layers: int) -> int:
    """The middle-to-upper layer that identity is trained on, where the paper finds e_core: two thirds up."""
    return layers * 2 // 3


@torch.inference_mode()
def evaluate(world: World, reader: Reader, heads: TasteHeads | None, section: TrainMllm) -> dict[str, float]:
    """On test users: is a user found again by another history, are liked and disliked attributes ranked first."""
    users = some_test_users(world)
    rng = np.random.default_rng(123)
    rows = []
    for _ in range(2):
        for start in range(0, len(users), section.batch):
            some = users[start : start + section.batch]
            histories = [world.history(user, rng, section.pictures, section.pictures) for user in some]
            rows.append(reader.states(histories).cpu())
    states = torch.cat(rows)  # [2 * users, layers, D]
    core = states[:, core_layer(states.shape[1])]
    once, again = F.normalize(F.layer_norm(core, core.shape[-1:]), dim=1).chunk(2)
    nearest = (once @ again.T).argmax(1)
    same_user = (nearest == torch.arange(len(users))).float().mean().item()
    figures = {"same_user_top1": same_user, "users": len(users)}
    if heads is None:
        return figures
    scores = heads(states.to(reader.mllm.device)).cpu().chunk(2, 1)
    truth = taste_targets(world, users * 2).chunk(2, 1)
    for name, own_scores, own_truth in zip(("liked", "disliked"), scores, truth, strict=True):
        rows = own_truth.any(1)
        # In a set whose users dislike nothing there are none.
        if rows.any():
            figures[f"{name}_precision"] = precision_at_k(own_scores[rows], own_truth[rows])
    return figures


def export(run: Run, model: nn.Module, peft_model) -> None:
    """Write what was trained: the LoRA, or the atelier's MLLM as a transformers folder beside its tokenizer.

    All processes have to call it, since each has a share of the weights; the first writes.
    """
    state = gather(model.state_dict() if peft_model is None else lora_weights(peft_model))
    if run.rank > 0:
        return
    if peft_model is not None:
        lora.save(peft_model, state, run.folder / "lora")
        return
    model.config.architectures = ["SmolVLMForConditionalGeneration"]
    write_atomic(MLLM_FOLDER / "config.json", model.config.to_json_string(use_diff=True).encode())
    # The head is tied to the embedding, so transformers needs no copy of it.
    state = {k: v for k, v in state.items() if k != "lm_head.weight"}
    save_weights(state, MLLM_FOLDER / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    with exit_with_message():
        main()
