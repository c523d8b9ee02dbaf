"""The MLLM and the CLIP vision encoder as the stages use them: many histories at once, exactly as the nodes read one.

Every family's decoder gets its own arguments (prefgen/mllm/families.py); here they are padded on the right and stacked,
and the last token of every prompt is found again by its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.compat import hidden_states_of
from prefgen.image_encoder import described
from prefgen.mllm.files import MLLMError
from prefgen.mllm.model import PreferenceMLLM
from prefgen.mllm.prompt import CLOSING_QUESTION

from ..common.atelier_clip import image_features
from ..common.bases import DTYPES
from ..common.cache import cached, digest_of
from ..common.devices import default_device
from ..common.precision import full_precision
from .image_tokens import pool_image_tokens
from .worlds import AtelierWorld, History, World

ENDS = ("<end_of_utterance>", "<|im_end|>")
TOGETHER = 8  # pictures in the vision tower at once


@dataclass(frozen=True)
class Asked:
    """A history with a question. shown: pictures that the question asks about; answer: "" for none."""

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
    """A MLLM over the pictures of a world. tokens: image tokens [pictures, n, D] of all of them, if they are cached;
    else the frozen vision tower reads what is needed."""

    def __init__(self, mllm: PreferenceMLLM, world: World, tokens: np.ndarray | None = None):
        self.mllm, self.world, self.tokens = mllm, world, tokens

    @property
    def fingerprint(self) -> dict:
        return self.mllm.fingerprint

    @torch.no_grad()
    def features(self, pictures: Sequence[int]) -> torch.Tensor:
        """Image tokens of a conversation's pictures one after the other, [sum of n, D].

        Nothing is kept from one conversation to the next: what else is in the vision tower's batch moves its last bits,
        and a resumed run has to be the straight one's equal.
        """
        if self.tokens is not None:
            return torch.from_numpy(self.tokens[np.asarray(pictures)]).float().flatten(0, 1).to(self.mllm.device)
        order = sorted(set(pictures))
        images = dict(zip(order, self.world.pictures(order), strict=True))
        pixels = torch.stack(
            [self.mllm.preprocess(torch.from_numpy(images[number]).float() / 255) for number in pictures]
        )
        return torch.cat([self.mllm.family.features(some) for some in pixels.split(TOGETHER)]).flatten(0, 1)

    def batch(self, asked: Sequence[Asked]) -> Batch:
        """Conversations, padded on the right; the embeddings carry gradients where they are trained."""
        rows, labels, last = [], [], []
        for one in asked:
            items = list(zip(one.history.liked.tolist(), one.history.prompts, strict=True))
            prompt = self.mllm.token_ids(items, one.question, len(one.shown))
            answer = self.answer_ids(one.answer)
            ids = torch.tensor([prompt + answer], device=self.mllm.device)
            embeds = self.mllm.model.get_input_embeddings()(ids)
            pictures = np.concatenate([one.history.pictures, one.shown]).astype(np.int64)
            places = ids == self.mllm.family.image_token_id
            rows.append(self.mllm.family.text_inputs(embeds, places, self.features(pictures.tolist()).to(embeds)))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
            last.append(len(prompt) - 1)
        length = max(map(len, labels))
        lengths = torch.tensor([len(row) for row in labels])
        inputs = {name: stacked([row[name] for row in rows], length) for name in rows[0]}
        inputs["attention_mask"] = (torch.arange(length) < lengths[:, None]).long().to(self.mllm.device)
        padded = torch.stack([F.pad(row, (0, length - len(row)), value=-100) for row in labels])
        return Batch(inputs, padded.to(self.mllm.device), torch.tensor(last, device=self.mllm.device))

    def answer_ids(self, answer: str) -> list[int]:
        """The answer and the sign that ends a turn, cut into tokens as they stand after the prompt's last words: alone,
        a SentencePiece tokenizer would begin every answer with the same space."""
        if not answer:
            return []
        tokenizer = self.mllm.tokenizer
        end = next((e for e in ENDS if e in tokenizer.get_added_vocab()), tokenizer.eos_token)
        before, space = ("Assistant:", " ") if end == ENDS[0] else ("\n", "")  # as the families' templates end
        given = tokenizer(before, add_special_tokens=False).input_ids
        whole = tokenizer(before + space + answer + end, add_special_tokens=False).input_ids
        return whole[len(given) :]

    def leaning(self, states: torch.Tensor, answers: tuple[str, str]) -> torch.Tensor:
        """How much more the MLLM would begin with the first answer than with the second, in logits [B]. states [B, D]:
        last states where prompts end. MLLMError when both begin alike."""
        first, second = (self.answer_ids(answer)[0] for answer in answers)
        if first == second:
            raise MLLMError(
                f"The tokenizer of {self.mllm.name} begins {answers[0]!r} and {answers[1]!r} alike, so nothing tells "
                "them apart: its files are damaged, or of another family."
            )
        return _difference(states, self.mllm.model.get_output_embeddings(), first, second)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(H [B, layers, D] float32 at the end of every prompt, last states [B, T, D])."""
        text = self.mllm.family.text
        rows, kept = torch.arange(len(batch.last), device=batch.last.device), {}
        learning = torch.is_grad_enabled()

        def ends(states: torch.Tensor) -> torch.Tensor:  # [B, T, D] -> [B, D]
            return states[rows, batch.last].float()

        def keep(index: int):
            def hook(_module, _inputs, output):
                states = hidden_states_of(output)
                # Gradient checkpointing runs a layer again without this hook: nothing may be computed in it then.
                kept[index] = states if learning else ends(states)

            return hook

        taps = [*text.layers[:-1], text.norm]  # the last layer's state is taken after the norm, as the nodes do
        hooks = [module.register_forward_hook(keep(i)) for i, module in enumerate(taps)]
        try:
            states = text(**batch.inputs, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        found = [ends(kept[i]) if learning else kept[i] for i in range(len(taps))]
        return torch.stack(found, 1), states

    @torch.inference_mode()
    def states(self, histories: Sequence[History]) -> torch.Tensor:
        """H [B, layers, D] float32 on the CPU, of histories with the closing question."""
        return self.forward(self.batch([Asked(history) for history in histories]))[0].cpu()


@full_precision
def _difference(states: torch.Tensor, head: torch.nn.Linear, first: int, second: int) -> torch.Tensor:
    """Logit of one token less that of another, fp32 [B]. In bf16 a logit of 20 is known to 0.06, and here a difference
    counts."""
    rows = head.weight[[first, second]].float()
    said = F.linear(states, rows, None if head.bias is None else head.bias[[first, second]].float())
    return said[:, 0] - said[:, 1]


def stacked(rows: list, length: int):
    """One of the decoder's arguments for several conversations. Tensors [1, T, ...] are padded to [B, length, ...],
    positions [3, 1, T] to [3, B, length]; lists (the deeper layers' image tokens) are joined."""
    if isinstance(rows[0], (list, tuple)):
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]
    if rows[0].ndim == 3 and rows[0].shape[1] == 1 and not rows[0].is_floating_point():
        return torch.cat([F.pad(row, (0, length - row.shape[-1])) for row in rows], 1)
    return torch.cat([F.pad(row, (0, 0) * (row.ndim - 2) + (0, length - row.shape[1])) for row in rows])


class Eyes:
    """CLIP image embeddings of a world's pictures. about: name, width, preprocessing and what `described` tells, for
    the adapter's header; digest: of the encoder's weights, for the key of what it computed."""

    def __init__(self, world: World, about: dict, digest: str):
        self.world, self.about, self.digest = world, about, digest

    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        """Unit embeddings [B, I]."""
        raise NotImplementedError


class AtelierEyes(Eyes):
    """The embedded CLIP; the whole pool is read once and kept beside the runs. rank, processes: as of `cached`.

    SystemExit where what is kept was read by another CLIP, or off another pool.
    """

    def __init__(self, world: AtelierWorld, runs: Path, rank: int = 0, processes: int = 1):
        from prefgen.atelier.models import CLIP_VISION_CONFIG, load_clip

        width = CLIP_VISION_CONFIG["projection_dim"]
        preprocessing = "bicubic 128, mean 0.5, std 0.5"
        clip, pool = load_clip(), world.pool
        digest = digest_of(clip.vision_model, clip.visual_projection)
        about = {"name": "atelier", "width": width, "preprocessing": preprocessing} | described(clip.state_dict())
        super().__init__(world, about, digest)

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                features = image_features(clip, pool.batch(slice(start, stop)))
                return {"clip_images": F.normalize(features, dim=1).half().numpy()}

        columns, key = {"clip_images": ((width,), np.float16)}, {"clip": digest, "pool": pool.digest}
        arrays = cached(runs, "clip_images", len(pool), columns, key, fill, 128, rank, processes)
        self.embeds = arrays["clip_images"]

    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.embeds[pictures]).float()


class ClipEyes(Eyes):
    """A transformers CLIP vision folder; a user's pictures stand in several histories, so the last ones are kept."""

    KEPT = 4096

    def __init__(self, world: World, folder: Path, device: str):
        from prefgen.lru import LeastRecentlyUsed

        from ..evaluation.compare.vision import Vision

        self.vision = Vision(folder, device)
        side = self.vision.model.config.image_size
        about = {"name": Path(folder).name, "width": self.vision.model.config.projection_dim}
        about |= {"preprocessing": f"bicubic {side}, CLIP's mean and std"}
        super().__init__(world, about | self.vision.about, digest_of(self.vision.model))
        self.known = LeastRecentlyUsed(self.KEPT)

    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        from PIL import Image

        new = sorted({int(p) for p in pictures} - set(self.known))
        if new:
            images = [Image.fromarray(picture) for picture in self.world.pictures(new)]
            for number, embed in zip(new, F.normalize(self.vision(images), dim=1), strict=True):
                self.known[number] = embed
        return torch.stack([self.known[int(p)] for p in pictures])


def reader_of(args, world: World, device=None) -> Reader:
    """The finished MLLM of a configuration: the atelier's, or a folder with the LoRA that `train_mllm` made."""
    if args.config.mllm.path is None:
        from prefgen.atelier.models import MLLM_FOLDER

        mllm = PreferenceMLLM.load(MLLM_FOLDER)
        return Reader(mllm, world, pool_image_tokens(args.runs, world.pool, mllm.model))
    mllm, lora = args.config.mllm, args.runs / "train_mllm" / "lora"
    given = lora if mllm.lora is not None else None
    if given is not None and not given.is_dir():
        raise SystemExit(f"{given} is missing: run `python -m training.train_mllm` first, or set mllm.lora=null.")
    device = str(device or default_device())
    loaded = PreferenceMLLM.load(mllm.path, DTYPES[mllm.precision], device, given, mllm.nf4 and given is None)
    return Reader(loaded, world)


def eyes_of(args, world: World, device=None, rank: int = 0, processes: int = 1) -> Eyes:
    """The image encoder of a configuration, for one of so many processes."""
    if args.config.clip_vision.path is None:
        return AtelierEyes(world, args.runs, rank, processes)
    return ClipEyes(world, args.config.clip_vision.path, str(device or default_device()))
