"""The preference MLLM: reads a whole history and one closing question, gives the last token's state of every layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..compat import hidden_states_of, load_image_text_to_text, lost_its_head, transformers_version
from ..errors import out_of_memory
from ..history import HistoryItem, PreferenceHistory
from ..lru import LeastRecentlyUsed
from ..pictures import resize
from . import foreign
from .families import family_of
from .files import MLLMError, check_folder, refuse, weights_digest
from .lora import check_lora, merge_lora
from .prompt import CLOSING_QUESTION, PROMPT_VERSION, build_messages, render_prompt
from .reading import chat_template_of, check_conversation, preprocessor_of, reading_digest

BATCH = 8
CACHED_PICTURES, CACHED_HISTORIES = 512, 256
CACHED_BYTES = 2**30  # of image tokens; large models give several MB a picture
ANSWER_TOKENS = 128


class PreferenceMLLM:
    """A transformers image-text-to-text model that reads preference histories.

    Pictures are resized to the family's square (bicubic, antialiased) and never split. Image tokens are cached by the
    picture's content, whole encodings by the history's; `stats` counts what really ran. Histories are read one at a
    time, so nothing is ever padded.
    """

    def __init__(self, model, tokenizer, name: str, revision: str, preprocessor: dict | None = None):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.family = family_of(model.config.model_type)(model, preprocessor)
        self.dtype = model.dtype
        text = model.config.get_text_config()
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
        self._features: LeastRecentlyUsed = LeastRecentlyUsed(CACHED_PICTURES)
        self._histories = LeastRecentlyUsed(CACHED_HISTORIES)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        lora: str | Path | None = None,
        nf4: bool = False,
    ) -> PreferenceMLLM:
        """Load a local folder, with a peft LoRA folder merged into it. nf4: 4-bit weights, computed in `dtype`.

        Raises MLLMError with one sentence for a folder that can't or must not be loaded.
        """
        folder = Path(folder)
        check_folder(folder)
        preprocessor = preprocessor_of(folder)
        if lora is not None:
            check_lora(Path(lora))
            if nf4:
                raise MLLMError(f"The LoRA {Path(lora).name} can't be merged into nf4: choose bf16, fp16 or fp32.")
        # The tokenizer first: it is small, and what is wrong with it is known before gigabytes are read.
        tokenizer = _load_tokenizer(folder)
        tokenizer.chat_template = chat_template_of(folder, tokenizer)
        model = _load_model(folder, dtype, device if nf4 else None)
        merged = None if lora is None else merge_lora(model, Path(lora))
        # 4-bit weights are packed where they are to be used.
        model = model if nf4 else model.to(device)
        mllm = cls(model, tokenizer, folder.name, weights_digest(folder), preprocessor)
        check_conversation(mllm)
        mllm.fingerprint |= {"lora": merged, "reading": reading_digest(mllm)}
        mllm.fingerprint |= {"precision": "nf4"} if nf4 else {}
        return mllm

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
        states = self._read(history, features, interrupt)
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
        Raises MLLMError with one sentence for values that are not numbers. The host waits once for every word.
        """
        if lost_its_head(self.model):
            raise MLLMError(
                f"The MLLM folder {self.name} has no language head, so it reads histories and can't answer: choose one "
                "that is saved with lm_head."
            )
        total = len(history) + 1
        features = self.image_features(history.items, lambda n: progress and progress(n, total), interrupt)
        words: list[int] = []
        ends = self._ends
        inputs, past = self._inputs(history, features, question), None
        while len(words) < limit:
            if interrupt:
                interrupt()
            output = self.family.text(**inputs, past_key_values=past, use_cache=True)
            logits = self.model.get_output_embeddings()(output.last_hidden_state[:, -1])
            word = logits.argmax(-1)
            # The word and whether it means anything come to the host together.
            token = int(torch.where(logits.isfinite().all(), word, -1))
            if token < 0:
                raise self._not_numbers()
            if token in ends:
                break
            words.append(token)
            inputs = self.family.next_inputs(inputs, self.model.get_input_embeddings()(word)[None])
            past = output.past_key_values
        if progress:
            progress(total, total)
        return self.tokenizer.decode(words, skip_special_tokens=True).strip()

    @property
    def _ends(self) -> set[int]:
        """The tokens that end an answer."""
        generation = getattr(self.model, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, (list, tuple)) else [ends])}

    def _not_numbers(self) -> MLLMError:
        return MLLMError(
            f"{self.name} gives values that are not numbers in {self.fingerprint['precision']}: choose another "
            "precision, or download its files again."
        )

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
            pixels = torch.stack([self.preprocess(item.image) for item in batch])
            for item, tokens in zip(batch, self.family.features(pixels), strict=True):
                found[item.digest] = self._keep(item.digest, tokens.cpu())
            self.stats["vision_runs"] += len(batch)
            if progress:
                progress(len(items) - len(waiting) + start + len(batch))
        return [found[item.digest] for item in items]

    def _keep(self, digest: str, tokens: torch.Tensor) -> torch.Tensor:
        """Cache a picture's tokens, within the bounds of count and of memory."""
        tokens = tokens.contiguous().clone()
        self._features.size = min(CACHED_PICTURES, max(1, CACHED_BYTES // tokens.nbytes))
        self._features[digest] = tokens
        return tokens

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """[H, W, 3] in 0..1 -> [3, S, S] as the vision tower wants it, on the model's device."""
        size, mean, std = self.family.image_size, torch.tensor(self.family.mean), torch.tensor(self.family.std)
        pixels = (resize(image, size, size) * 255).round() / 255
        return ((pixels - mean) / std).movedim(-1, 0).to(self.device, self.dtype)

    def _inputs(self, history: PreferenceHistory, features: list[torch.Tensor], question: str) -> dict:
        """The conversation as the decoder's arguments."""
        items = [(item.liked, item.prompt) for item in history.items]
        ids = torch.tensor([self.token_ids(items, question)], device=self.device)
        embeds = self.model.get_input_embeddings()(ids)
        places = ids == self.family.image_token_id
        pictures = torch.cat(features).to(embeds)
        if int(places.sum()) != len(pictures):
            raise MLLMError(
                f"{self.name}'s tokenizer wrote {int(places.sum())} image tokens for {len(pictures)}: its files "
                "don't belong together."
            )
        return self.family.text_inputs(embeds, places, pictures)

    def _read(
        self, history: PreferenceHistory, features: list[torch.Tensor], interrupt: Callable[[], None] | None
    ) -> torch.Tensor:
        """One prefill with hooks on every decoder layer that keep the last token only, and that may interrupt."""
        inputs = self._inputs(history, features, CLOSING_QUESTION)
        layers, norm = self.family.text.layers, self.family.text.norm
        kept: list[torch.Tensor | None] = [None] * len(layers)

        def keep(index: int):
            def hook(_module, _inputs, output):
                if interrupt:
                    interrupt()
                kept[index] = hidden_states_of(output)[0, -1].float().cpu()

            return hook

        taps = [*layers[:-1], norm]
        hooks = [module.register_forward_hook(keep(i)) for i, module in enumerate(taps)]
        try:
            self.family.text(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.stats["prefill_runs"] += 1
        states = torch.stack(kept)
        if not torch.isfinite(states).all():
            raise self._not_numbers()
        return states

    def token_ids(self, items: Sequence[tuple[bool, str]], question: str, shown: int = 0) -> list[int]:
        """The conversation about a history of (liked, prompt), up to where the assistant answers. shown: how many more
        pictures the question asks about."""
        text = self.written(items, question, shown)
        if getattr(self.tokenizer, "chat_template", None):
            text = text.replace(self.image_token, self.family.image_text(self.image_token))
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def written(self, items: Sequence[tuple[bool, str]], question: str, shown: int = 0) -> str:
        """The same as text; by a chat template every picture is one image token, without one all that it takes."""
        verdicts, prompts = [liked for liked, _ in items], [self._plain(prompt) for _, prompt in items]
        if not getattr(self.tokenizer, "chat_template", None):
            per_picture = self.family.tokens_per_image
            return render_prompt(verdicts, prompts, question, self.image_token, per_picture, shown)
        inline = self.image_token if self.family.inline else None
        messages = build_messages(verdicts, prompts, question, inline, shown)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @property
    def image_token(self) -> str:
        """The tokenizer's sign for a picture."""
        token = self.tokenizer.convert_ids_to_tokens(self.family.image_token_id)
        if token is None:
            raise MLLMError(
                f"The tokenizer of {self.name} has no token {self.family.image_token_id}, which its config.json takes "
                "for pictures: take all files from one release of the model."
            )
        return token

    def _plain(self, prompt: str) -> str:
        """A prompt without the tokenizer's own signs: "<image>" in it would be taken for one more picture."""
        for sign in self.tokenizer.get_added_vocab():
            prompt = prompt.replace(sign, " ")
        return " ".join(prompt.split())


def _load_tokenizer(folder: Path):
    """The folder's tokenizer. Raises MLLMError with one sentence that names what is missing or too old."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a missing file is an OSError, a ValueError or a KeyError, by version
        refuse(_tokenizer_files(folder))
        reason = _first_line(error)
        for package in ("sentencepiece", "tiktoken", "protobuf"):
            if package in str(error).lower() and not (folder / "tokenizer.json").is_file():
                raise MLLMError(
                    f"The tokenizer files of the MLLM folder {folder.name} lack tokenizer.json: put it there from "
                    f"where the model comes from, or pip install {package}."
                ) from error
        if "untagged enum" in str(error) or "unknown variant" in str(error):
            raise MLLMError(
                f"The tokenizer files of the MLLM folder {folder.name} are newer than the installed tokenizers can "
                f"read: update transformers ({transformers_version()} is installed) and tokenizers."
            ) from error
        raise MLLMError(
            f"The tokenizer files of the MLLM folder {folder.name} are missing or damaged ({reason}): download them "
            "again."
        ) from error


def _tokenizer_files(folder: Path) -> str | None:
    """What stands in a tokenizer file in place of it, in one sentence."""
    where = f"the MLLM folder {folder.name}"
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"):
        file = folder / name
        try:
            if file.is_file() and (sentence := foreign.damage(file, where)):
                return sentence
        except OSError as error:
            return foreign.unreadable(error, file, where)
    return None


def _load_model(folder: Path, dtype: torch.dtype, nf4_device: str | None):
    """The folder's model. Raises MLLMError with one sentence."""
    try:
        return load_image_text_to_text(folder, dtype, nf4_device)
    except Exception as error:  # transformers and safetensors raise many kinds for a broken folder
        if out_of_memory(error):
            raise MLLMError(
                f"Memory ran out while {folder.name} was loaded: close other programs, choose precision bf16, or a "
                "smaller MLLM."
            ) from error
        raise MLLMError(
            f"The MLLM folder {folder.name} can't be loaded by transformers {transformers_version()} "
            f"({_first_line(error)}): take config.json and all weights from one release of the model."
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says, short and plain enough to stand in a sentence."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>|\b\w*(?:Error|Exception)\b:?", r"\1", str(error)).strip()
    return text.splitlines()[0][:80].rstrip(" .:") if text else "no reason given"
