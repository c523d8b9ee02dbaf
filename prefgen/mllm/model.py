"""The preference MLLM: reads a whole history and one closing question, gives the last token's state of every layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..compat import hidden_states_of, load_image_text_to_text
from ..history import HistoryItem, PreferenceHistory, resize
from .cache import LeastRecentlyUsed
from .families import family_of
from .prompt import CLOSING_QUESTION, PROMPT_VERSION, build_messages, render_prompt

BATCH = 8
CACHED_PICTURES, CACHED_HISTORIES = 512, 256
ANSWER_TOKENS = 128


class MLLMError(ValueError):
    """A folder that can't be used as a preference MLLM, in one sentence for the artist."""


class PreferenceMLLM:
    """A transformers image-text-to-text model that reads preference histories.

    Pictures are resized to the vision tower's square (bicubic, antialiased, mean and std 0.5) and never split. Image
    tokens are cached by the picture's content, whole encodings by the history's; `stats` counts what really ran.
    """

    def __init__(self, model, tokenizer, name: str, revision: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.family = family_of(model.config.model_type)(model)
        self.dtype = next(model.parameters()).dtype
        text = model.config.text_config
        self.fingerprint = {
            "name": name,
            "revision": revision,
            "lora": None,
            "prompt_version": PROMPT_VERSION,
            "precision": str(self.dtype).removeprefix("torch."),
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
        }
        self.stats = {"vision_runs": 0, "prefill_runs": 0, "history_hits": 0, "feature_hits": 0}
        self._features = LeastRecentlyUsed(CACHED_PICTURES)
        self._histories = LeastRecentlyUsed(CACHED_HISTORIES)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreferenceMLLM:
        """Load a local folder. Raises MLLMError with one sentence for a folder that can't or must not be loaded."""
        from transformers import AutoTokenizer

        folder = Path(folder)
        check_folder(folder)
        try:
            model = load_image_text_to_text(folder, dtype)
        except Exception as error:  # transformers and safetensors raise many kinds for a broken folder
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MLLMError(f"The MLLM folder {folder.name} can't be loaded ({reason}): download it again.") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a missing file is an OSError, a ValueError or a KeyError, by version
            raise MLLMError(
                f"The tokenizer files of the MLLM folder {folder.name} are missing or damaged: download them again."
            ) from error
        return cls(model.to(device), tokenizer, folder.name, weights_digest(folder))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def memory_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def knows(self, history: PreferenceHistory) -> bool:
        """Whether the history was encoded before, so that encoding it runs no model."""
        return history.digest in self._histories

    @torch.inference_mode()
    def encode(
        self,
        history: PreferenceHistory,
        progress: Callable[[int, int], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """H: fp32 [layers, D] on the CPU, the last token's state after the history and the closing question.

        Entry i is the output of decoder layer i; the last one is taken after the final norm. progress(done, total) is
        called as pictures are read; interrupt() is called between steps and may raise.
        """
        key = history.digest
        if key in self._histories:
            self.stats["history_hits"] += 1
            return self._histories[key].clone()
        total = len(history) + 1
        features = self.image_features(history.items, lambda n: progress and progress(n, total), interrupt)
        if interrupt:
            interrupt()
        states = self._read(history, features)
        self._histories[key] = states
        if progress:
            progress(total, total)
        return states.clone()

    @torch.inference_mode()
    def answer(
        self,
        history: PreferenceHistory,
        question: str = CLOSING_QUESTION,
        limit: int = ANSWER_TOKENS,
        progress: Callable[[int, int], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> str:
        """What the MLLM answers to a question about the history, in its likeliest words, at most `limit` tokens long.

        progress(done, total) is called as pictures are read; interrupt() is called before every word and may raise.
        """
        total = len(history) + 1
        features = self.image_features(history.items, lambda n: progress and progress(n, total), interrupt)
        words: list[int] = []
        embeds, past = self._embeds(history, features, question), None
        while len(words) < limit:
            if interrupt:
                interrupt()
            output = self.family.text(inputs_embeds=embeds, past_key_values=past, use_cache=True)
            word = self.model.lm_head(output.last_hidden_state[:, -1]).argmax(-1)
            if int(word) in self._ends:
                break
            words.append(int(word))
            embeds, past = self.model.get_input_embeddings()(word)[None], output.past_key_values
        if progress:
            progress(total, total)
        return self.tokenizer.decode(words, skip_special_tokens=True).strip()

    @property
    def _ends(self) -> set[int]:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @torch.inference_mode()
    def image_features(
        self,
        items: Sequence[HistoryItem],
        progress: Callable[[int], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> list[torch.Tensor]:
        """Image tokens [n, D] of every picture; only pictures that were never read go through the vision tower."""
        found = {item.digest: self._features[item.digest] for item in items if item.digest in self._features}
        self.stats["feature_hits"] += sum(item.digest in found for item in items)
        new = {item.digest: item for item in items if item.digest not in found}
        waiting = list(new.values())
        for start in range(0, len(waiting), BATCH):
            if interrupt:
                interrupt()
            batch = waiting[start : start + BATCH]
            pixels = torch.stack([self._preprocess(item.image) for item in batch])
            for item, tokens in zip(batch, self.family.features(pixels), strict=True):
                found[item.digest] = self._features[item.digest] = tokens.cpu()
            self.stats["vision_runs"] += len(batch)
            if progress:
                progress(len(items) - len(waiting) + start + len(batch))
        return [found[item.digest] for item in items]

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """[H, W, 3] in 0..1 -> [3, S, S] in -1..1 on the model's device."""
        size = self.family.image_size
        pixels = (resize(image, size, size) * 255).round() / 255
        return ((pixels - 0.5) / 0.5).movedim(-1, 0).to(self.device, self.dtype)

    def _embeds(self, history: PreferenceHistory, features: list[torch.Tensor], question: str) -> torch.Tensor:
        """The conversation as the decoder reads it, [1, tokens, D]."""
        ids = torch.tensor([self._token_ids(history, question)], device=self.device)
        embeds = self.model.get_input_embeddings()(ids)
        places = ids == self.family.image_token_id
        pictures = torch.cat(features).to(embeds)
        if int(places.sum()) != len(pictures):
            raise MLLMError(
                f"{self.name}'s tokenizer wrote {int(places.sum())} image tokens for {len(pictures)}: its files "
                "don't belong together."
            )
        return embeds.masked_scatter(places[..., None], pictures)

    def _read(self, history: PreferenceHistory, features: list[torch.Tensor]) -> torch.Tensor:
        """One prefill with hooks on every decoder layer that keep the last token only."""
        embeds = self._embeds(history, features, CLOSING_QUESTION)
        layers, norm = self.family.text.layers, self.family.text.norm
        kept: list[torch.Tensor | None] = [None] * len(layers)

        def keep(index: int):
            def hook(_module, _inputs, output):
                kept[index] = hidden_states_of(output)[0, -1].float().cpu()

            return hook

        taps = [*layers[:-1], norm]
        hooks = [module.register_forward_hook(keep(i)) for i, module in enumerate(taps)]
        try:
            self.family.text(inputs_embeds=embeds, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.stats["prefill_runs"] += 1
        states = torch.stack(kept)
        if not torch.isfinite(states).all():
            raise MLLMError(
                f"{self.name} gives values that are not numbers in {self.fingerprint['precision']}: choose another "
                "precision, or download its files again."
            )
        return states

    def _token_ids(self, history: PreferenceHistory, question: str) -> list[int]:
        verdicts, prompts = [i.liked for i in history.items], [self._plain(i.prompt) for i in history.items]
        image_token = self.tokenizer.convert_ids_to_tokens(self.family.image_token_id)
        if getattr(self.tokenizer, "chat_template", None):
            messages = build_messages(verdicts, prompts, question)
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            text = text.replace(image_token, self.family.image_text(image_token))
        else:
            text = render_prompt(verdicts, prompts, question, image_token, self.family.tokens_per_image)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _plain(self, prompt: str) -> str:
        """A prompt without the tokenizer's own signs: "<image>" in it would be taken for one more picture."""
        for sign in self.tokenizer.get_added_vocab():
            prompt = prompt.replace(sign, " ")
        return " ".join(prompt.split())


def check_folder(folder: Path) -> None:
    """Refuse a folder before anything of it is loaded. Raises MLLMError with one sentence."""
    if not (folder / "config.json").is_file():
        raise MLLMError(f"The MLLM folder {folder.name} has no config.json: choose a folder of a transformers model.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise MLLMError(f"The config.json of the MLLM folder {folder.name} is damaged: download it again.") from error
    if "auto_map" in config:
        raise MLLMError(
            f"The MLLM folder {folder.name} asks to run code of its own, which PrefGen never does: choose a model "
            "that transformers knows."
        )
    if family_of(config.get("model_type", "")) is None:
        raise MLLMError(
            f"The MLLM folder {folder.name} holds a {config.get('model_type', 'model')}, which PrefGen can't read "
            "histories with: choose an Idefics3 or SmolVLM model."
        )
    if not list(folder.glob("*.safetensors")):
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        what = "only pickled weights, which PrefGen never opens" if pickles else "no weights"
        raise MLLMError(f"The MLLM folder {folder.name} has {what}: put its .safetensors files there.")


def weights_digest(folder: Path, pieces: int = 64, size: int = 1 << 16) -> str:
    """sha256 over names, sizes and evenly spaced pieces of the weight files (small files whole): tells revisions apart
    without reading gigabytes."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        length = file.stat().st_size
        digest.update(f"{file.name} {length}".encode())
        with file.open("rb") as stream:
            if length <= pieces * size * 4:
                digest.update(stream.read())
                continue
            for i in range(pieces):
                stream.seek(i * (length - size) // (pieces - 1))
                digest.update(stream.read(size))
    return digest.hexdigest()
