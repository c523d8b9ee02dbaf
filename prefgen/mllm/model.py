"""The preference MLLM: reads a whole history and one closing question, gives the last token's state of every layer.

PrefGen takes its user representation from such hidden states, pooled at the last token (arXiv 2512.06020): all pictures
and verdicts stand before that token, so its states are about the history as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..compat import lost_its_head
from ..history import HistoryItem, PreferenceHistory
from ..lru import LeastRecentlyUsed
from ..pictures import resize
from .answer import Answer
from .families import family_parts, layer_outputs
from .files import MLLMError, check_folder, weights_digest
from .loading import load_model, load_tokenizer
from .lora import check_lora, merge_lora
from .prompt import CLOSING_QUESTION, PROMPT_VERSION, build_messages, render_prompt
from .reading import chat_template_of, check_conversation, preprocessor_of, reading_digest

BATCH = 8  # pictures that go through the vision tower together
CACHED_PICTURES = 512
# Of image tokens: large models give several MB a picture.
CACHED_BYTES = 2**30
CACHED_HISTORIES = 256
ANSWER_TOKENS = 128


class PreferenceMLLM:
    """A transformers image-text-to-text model that reads preference histories.

    Pictures are resized to the family's square (bicubic, antialiased) and never split. Image tokens are cached by the
    picture's content, whole encodings by the history's; `stats` counts what really ran. Histories are read one at a
    time, so nothing is ever padded.
    """

    def __init__(self, model, tokenizer, name: str, revision: str, preprocessor: dict | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.family = family_parts(model, preprocessor)
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
        self._features = LeastRecentlyUsed(CACHED_PICTURES)
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
        # The tokenizer first: it is small, so what is wrong with it is said before gigabytes are read.
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = chat_template_of(folder, tokenizer)
        model = load_model(folder, dtype, device if nf4 else None)
        merged = None if lora is None else merge_lora(model, Path(lora))
        # 4-bit weights are packed where they are to be used.
        model = model if nf4 else model.to(device)
        mllm = cls(model, tokenizer, folder.name, weights_digest(folder), preprocessor)
        check_conversation(mllm)
        mllm.fingerprint |= {"lora": merged, "reading": reading_digest(mllm)}
        if nf4:
            mllm.fingerprint["precision"] = "nf4"
        return mllm

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def has_encoded(self, history: PreferenceHistory) -> bool:
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
            # A copy: what a caller does to it must not change what the next one gets.
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

    def answer(
        self,
        history: PreferenceHistory,
        question: str = CLOSING_QUESTION,
        limit: int = ANSWER_TOKENS,
        progress: Callable[[int, int], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> str:
        """What the MLLM answers to a question about the history: the text of `spoken`."""
        return self.spoken(history, question, limit, progress, interrupt).text

    @torch.inference_mode()
    def spoken(
        self,
        history: PreferenceHistory,
        question: str = CLOSING_QUESTION,
        limit: int = ANSWER_TOKENS,
        progress: Callable[[int, int], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> Answer:
        """An answer in the MLLM's likeliest words, at most `limit` tokens long, with the probability of each.

        progress(done, total) is called as pictures are read; interrupt() is called before every word and may raise.
        Raises MLLMError with one sentence for values that are not numbers. The host waits once for every word.
        """
        if lost_its_head(self.model):
            raise MLLMError(
                f"The MLLM folder {self.name} has no language head, so it can read histories but not answer: choose "
                "one that is saved with lm_head."
            )
        total = len(history) + 1
        features = self.image_features(history.items, lambda n: progress and progress(n, total), interrupt)
        tokens: list[int] = []
        probabilities: list[float] = []
        end_tokens = self._end_tokens()
        inputs = self._inputs(history, features, question)
        past = None
        while len(tokens) < limit:
            if interrupt:
                interrupt()
            output = self.family.text(**inputs, past_key_values=past, use_cache=True)
            logits = self.model.get_output_embeddings()(output.last_hidden_state[:, -1])
            likeliest = logits.argmax(-1)
            # The token, its probability and whether both mean anything come to the host together: one wait, not three.
            # A 32-bit number holds every token below 2^24, and no vocabulary has more.
            probability = logits.float().softmax(-1).amax(-1)
            number, sure = torch.where(
                logits.isfinite().all(), torch.cat([likeliest.float(), probability]), -1
            ).tolist()
            token = int(number)
            if token < 0:
                raise self._not_numbers()
            if token in end_tokens:
                break
            tokens.append(token)
            probabilities.append(sure)
            inputs = self.family.next_inputs(inputs, self.model.get_input_embeddings()(likeliest)[None])
            past = output.past_key_values
        if progress:
            progress(total, total)
        return Answer.of_tokens(
            tokens, probabilities, lambda part: self.tokenizer.decode(part, skip_special_tokens=True)
        )

    def _end_tokens(self) -> set[int]:
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
        # A dictionary of their own: a history may have more pictures than the cache has room for.
        features = {item.digest: self._features[item.digest] for item in items if item.digest in self._features}
        self.stats["feature_hits"] += sum(item.digest in features for item in items)
        unread = list({item.digest: item for item in items if item.digest not in features}.values())
        for start in range(0, len(unread), BATCH):
            if interrupt:
                interrupt()
            batch = unread[start : start + BATCH]
            pixels = torch.stack([self.preprocess(item.image) for item in batch])
            for item, tokens in zip(batch, self.family.features(pixels), strict=True):
                features[item.digest] = self._cached(item.digest, tokens.cpu())
            self.stats["vision_runs"] += len(batch)
            if progress:
                progress(len(items) - len(unread) + start + len(batch))
        return [features[item.digest] for item in items]

    def _cached(self, digest: str, tokens: torch.Tensor) -> torch.Tensor:
        """A picture's tokens, cached within the bounds of count and of memory."""
        tokens = tokens.contiguous().clone()
        self._features.size = min(CACHED_PICTURES, max(1, CACHED_BYTES // tokens.nbytes))
        self._features[digest] = tokens
        return tokens

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """[H, W, 3] in 0..1 -> [3, S, S] as the vision tower wants it, on the model's device."""
        size = self.family.image_size
        # In 8 bits, as image processors hand a resized picture on.
        pixels = (resize(image, size, size) * 255).round() / 255
        mean = torch.tensor(self.family.mean)
        std = torch.tensor(self.family.std)
        return ((pixels - mean) / std).movedim(-1, 0).to(self.device, self.dtype)

    def _inputs(self, history: PreferenceHistory, features: list[torch.Tensor], question: str) -> dict:
        """The conversation as the decoder's arguments."""
        items = [(item.liked, item.prompt) for item in history.items]
        return self.text_inputs(self.token_ids(items, question), torch.cat(features))

    def text_inputs(self, ids: list[int], image_tokens: torch.Tensor) -> dict:
        """The decoder's arguments for tokens [T] with pictures [n, D] in the image tokens' places."""
        places = ids.count(self.family.image_token_id)
        if places != len(image_tokens):
            raise MLLMError(
                f"{self.name}'s tokenizer wrote {places} image tokens for {len(image_tokens)}: its files don't belong "
                "together."
            )
        tokens = torch.tensor([ids], device=self.device)
        embeds = self.model.get_input_embeddings()(tokens)
        return self.family.text_inputs(embeds, tokens == self.family.image_token_id, image_tokens.to(embeds))

    def _read(
        self, history: PreferenceHistory, features: list[torch.Tensor], interrupt: Callable[[], None] | None
    ) -> torch.Tensor:
        """H of a history: one prefill with hooks on every decoder layer, which take the last token only, so that the
        states of all others are let go, and may interrupt."""
        inputs = self._inputs(history, features, CLOSING_QUESTION)
        last_tokens: list[torch.Tensor] = []

        def take_last_token(_layer: int, states: torch.Tensor) -> None:
            if interrupt:
                interrupt()
            last_tokens.append(states[0, -1].float().cpu())

        with layer_outputs(self.family.text, take_last_token):
            self.family.text(**inputs, use_cache=False)
        self.stats["prefill_runs"] += 1
        states = torch.stack(last_tokens)
        if not torch.isfinite(states).all():
            raise self._not_numbers()
        return states

    def token_ids(self, items: Sequence[tuple[bool, str]], question: str, shown: int = 0) -> list[int]:
        """The conversation about a history of (liked, prompt), up to where the assistant answers. shown: how many more
        pictures the question asks about."""
        text = self.conversation(items, question, shown)
        if getattr(self.tokenizer, "chat_template", None):
            text = text.replace(self.image_token, self.family.image_text(self.image_token))
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def conversation(self, items: Sequence[tuple[bool, str]], question: str, shown: int = 0) -> str:
        """The same as text; by a chat template every picture is one image token, without one all that it takes."""
        verdicts = [liked for liked, _ in items]
        prompts = [self._plain(prompt) for _, prompt in items]
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
                f"The tokenizer of {self.name} has no token {self.family.image_token_id}, which its config.json uses "
                "for pictures: take all files from one release of the model."
            )
        return token

    def _plain(self, prompt: str) -> str:
        """A prompt without the tokenizer's own signs: "<image>" in it would be taken for one more picture."""
        for sign in self.tokenizer.get_added_vocab():
            prompt = prompt.replace(sign, " ")
        return " ".join(prompt.split())
