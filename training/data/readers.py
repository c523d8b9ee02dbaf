"""The MLLM as the stages use it: many conversations at once, each exactly as the nodes read one.

Every family's decoder gets its own arguments (prefgen/mllm/families.py); here they are padded on the right and stacked,
and the last token of every prompt is taken at its own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.atelier.models import MLLM_FOLDER
from prefgen.dtypes import DTYPES
from prefgen.mllm.families import layer_outputs
from prefgen.mllm.files import MLLMError
from prefgen.mllm.model import PreferenceMLLM
from prefgen.mllm.prompt import CLOSING_QUESTION

from ..common.ahead import Ahead, Spans
from ..common.cache import cached
from ..common.devices import default_device
from ..common.precision import full_precision
from .image_tokens import pool_image_tokens, vision_digest
from .worlds import AtelierWorld, DataSetWorld, History, World

# The sign that ends a turn: SmolVLM's and Idefics', and Qwen's. Any other tokenizer's is its eos token.
TURN_ENDS = ("<end_of_utterance>", "<|im_end|>")
# Pictures in the vision tower at once.
VISION_BATCH = 8
# Pictures of a piece of the cache: whole batches, so that a resumed cache is read in the same ones.
TOKENS_AT_ONCE = 8 * VISION_BATCH
TOKEN_TYPES: dict[str, type] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.int16}


@dataclass(frozen=True)
class Conversation:
    """A history and a question about its user. shown: pictures that the question asks about, by their numbers; answer:
    "" for none."""

    history: History
    question: str = CLOSING_QUESTION
    answer: str = ""
    shown: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class Batch:
    """inputs: the decoder's arguments for B conversations; labels [B, T], -100 outside of answers; last [B]: where each
    prompt ends."""

    inputs: dict
    labels: torch.Tensor
    last: torch.Tensor


class Reader:
    """An MLLM over the pictures of a world. tokens: image tokens [pictures, n, D] of all of them, if they are cached
    (int16 for the bits of bf16, which numpy hasn't); else the frozen vision tower reads what is needed."""

    def __init__(self, mllm: PreferenceMLLM, world: World | None, tokens: np.ndarray | None = None):
        self.mllm = mllm
        self.world = world
        self.tokens = tokens

    @property
    def fingerprint(self) -> dict:
        return self.mllm.fingerprint

    @torch.inference_mode()
    def states(self, histories: Sequence[History]) -> torch.Tensor:
        """H [B, layers, D] float32 on the CPU, of histories with the closing question."""
        return self.forward(self.batch([Conversation(history) for history in histories]))[0].cpu()

    def batch(self, conversations: Sequence[Conversation]) -> Batch:
        """Conversations, padded on the right; the embeddings carry gradients where they are trained."""
        device = self.mllm.device
        rows = []
        labels = []
        last = []
        for conversation in conversations:
            history = conversation.history
            items = list(zip(history.liked.tolist(), history.prompts, strict=True))
            prompt = self.mllm.token_ids(items, conversation.question, len(conversation.shown))
            answer = self.answer_ids(conversation.answer)
            pictures = np.concatenate([history.pictures, conversation.shown]).astype(np.int64)
            rows.append(self.mllm.text_inputs(prompt + answer, self.features(pictures.tolist())))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
            last.append(len(prompt) - 1)
        lengths = torch.tensor([len(row) for row in labels])
        longest = int(lengths.max())
        inputs = {name: stacked([row[name] for row in rows], longest) for name in rows[0]}
        inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long().to(device)
        padded = torch.stack([F.pad(row, (0, longest - len(row)), value=-100) for row in labels])
        return Batch(inputs, padded.to(device), torch.tensor(last, device=device))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(H [B, layers, D] float32 at the end of every prompt, last states [B, T, D])."""
        text = self.mllm.family.text
        rows = torch.arange(len(batch.last), device=batch.last.device)
        learning = torch.is_grad_enabled()
        states_of = {}

        def ends(states: torch.Tensor) -> torch.Tensor:  # [B, T, D] -> [B, D]
            return states[rows, batch.last].float()

        def take(layer: int, states: torch.Tensor) -> None:
            # Gradient checkpointing runs a layer again without its hook: nothing may be computed in it then.
            states_of[layer] = states if learning else ends(states)

        with layer_outputs(text, take):
            last_states = text(**batch.inputs, use_cache=False).last_hidden_state
        layers = [ends(states) if learning else states for _, states in sorted(states_of.items())]
        return torch.stack(layers, 1), last_states

    @torch.no_grad()
    def features(self, pictures: Sequence[int]) -> torch.Tensor:
        """Image tokens of a conversation's pictures one after the other, [sum of n, D].

        Nothing is cached from one conversation to the next: what else is in the vision tower's batch moves its last
        bits, and a resumed run has to be the straight one's equal.
        """
        if self.tokens is not None:
            tokens = torch.from_numpy(self.tokens[np.asarray(pictures)])
            tokens = tokens.view(torch.bfloat16) if tokens.dtype == torch.int16 else tokens
            return tokens.float().flatten(0, 1).to(self.mllm.device)
        order = sorted(set(pictures))
        images = dict(zip(order, self.world.pictures(order), strict=True))
        return picture_tokens(self.mllm, [images[number] for number in pictures]).flatten(0, 1)

    def answer_ids(self, answer: str) -> list[int]:
        """The answer and the sign that ends a turn, cut into tokens as they stand after the prompt's last words: alone,
        a SentencePiece tokenizer would begin every answer with the same space."""
        if not answer:
            return []
        tokenizer = self.mllm.tokenizer
        end = next((sign for sign in TURN_ENDS if sign in tokenizer.get_added_vocab()), tokenizer.eos_token)
        # As the families' templates end.
        before, space = ("Assistant:", " ") if end == TURN_ENDS[0] else ("\n", "")
        prefix = tokenizer(before, add_special_tokens=False).input_ids
        complete = tokenizer(before + space + answer + end, add_special_tokens=False).input_ids
        return complete[len(prefix) :]

    def leaning(self, states: torch.Tensor, answers: tuple[str, str]) -> torch.Tensor:
        """How much more the MLLM would begin with the first answer than with the second, in logits [B]. states [B, D]:
        last states where prompts end. MLLMError when both begin alike."""
        first, second = (self.answer_ids(answer)[0] for answer in answers)
        if first == second:
            raise MLLMError(
                f"The tokenizer of {self.mllm.name} begins {answers[0]!r} and {answers[1]!r} alike, so nothing tells "
                "them apart: its files are damaged, or of another family."
            )
        return _logit_difference(states, self.mllm.model.get_output_embeddings(), first, second)


@full_precision
def _logit_difference(states: torch.Tensor, head: torch.nn.Linear, first: int, second: int) -> torch.Tensor:
    """Logit of one token less that of another, fp32 [B]. In bf16 a logit of 20 is known to 0.06, and here a difference
    counts."""
    bias = None if head.bias is None else head.bias[[first, second]].float()
    logits = F.linear(states, head.weight[[first, second]].float(), bias)
    return logits[:, 0] - logits[:, 1]


def picture_tokens(mllm: PreferenceMLLM, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Image tokens [B, n, D] of pictures uint8 [H, W, 3] by the MLLM's vision tower."""
    pixels = torch.stack([mllm.preprocess(torch.from_numpy(picture).float() / 255) for picture in pictures])
    return torch.cat([mllm.family.features(some) for some in pixels.split(VISION_BATCH)])


def stacked(rows: list, length: int):
    """One of the decoder's arguments for several conversations. Tensors [1, T, ...] are padded to [B, length, ...],
    positions [3, 1, T] to [3, B, length]; lists (the deeper layers' image tokens) are joined."""
    if isinstance(rows[0], (list, tuple)):
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]
    if rows[0].ndim == 3 and rows[0].shape[1] == 1 and not rows[0].is_floating_point():
        return torch.cat([F.pad(row, (0, length - row.shape[-1])) for row in rows], 1)
    return torch.cat([F.pad(row, (0, 0) * (row.ndim - 2) + (0, length - row.shape[1])) for row in rows])


@torch.no_grad()
def data_set_tokens(
    args, world: DataSetWorld, mllm: PreferenceMLLM, rank: int = 0, world_size: int = 1
) -> np.ndarray | None:
    """Image tokens [pictures, n, D] of a whole set for a `Reader`, memory-mapped, read once by the frozen vision tower;
    None unless mllm.cache_vision asks for them. The embedded MLLM's are always cached. All processes have to call
    it."""
    config = args.config.mllm
    embedded = config.path is None
    if not (config.cache_vision or embedded):
        return None
    precision = "fp16" if embedded else config.precision
    one = picture_tokens(mllm, world.pictures([0]))
    columns = {"image_tokens": (tuple(one.shape[1:]), TOKEN_TYPES[precision])}
    # A LoRA is on the decoder alone, so the stages before and after it share what the tower said. The embedded MLLM's
    # decoder is trained in all its weights: its tower is known by itself.
    if embedded:
        key = {"eyes": vision_digest(mllm.model)}
    else:
        key = {name: mllm.fingerprint.get(name) for name in ("revision", "reading")}
    key |= {"precision": precision, "data": world.digest}
    count = len(world.index)
    spans = Spans(count, TOKENS_AT_ONCE, world_size)
    pictures = Ahead(lambda start: world.pictures(range(count)[spans.rows(start)]), spans.following)

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        tokens = picture_tokens(mllm, pictures(start)).to(DTYPES[precision]).cpu()
        return {"image_tokens": (tokens.view(torch.int16) if precision == "bf16" else tokens).numpy()}

    arrays = cached(args.runs, "image_tokens", count, columns, key, fill, TOKENS_AT_ONCE, rank, world_size)
    return arrays["image_tokens"]


def load_reader(args, world: World, device=None, rank: int = 0, world_size: int = 1) -> Reader:
    """The finished MLLM of a configuration: the atelier's, or a folder with the LoRA that `train_mllm` trained. rank,
    world_size: as of `cached`.

    SystemExit where that LoRA is missing.
    """
    config = args.config.mllm
    if config.path is None:
        mllm = PreferenceMLLM.load(MLLM_FOLDER)
        if isinstance(world, AtelierWorld):
            return Reader(mllm, world, pool_image_tokens(args.runs, world.pool, mllm.model))
        return Reader(mllm, world, data_set_tokens(args, world, mllm, rank, world_size))
    lora = args.runs / "train_mllm" / "lora" if config.lora is not None else None
    if lora is not None and not lora.is_dir():
        raise SystemExit(f"{lora} is missing: run `python -m training.train_mllm` first, or set mllm.lora=null.")
    # A LoRA is merged into whole weights, so 4-bit ones are for an MLLM that is taken as it is.
    nf4 = config.nf4 and lora is None
    device = str(device or default_device())
    mllm = PreferenceMLLM.load(config.path, DTYPES[config.precision], device, lora, nf4)
    return Reader(mllm, world, data_set_tokens(args, world, mllm, rank, world_size))
