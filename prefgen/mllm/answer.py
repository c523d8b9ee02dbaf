"""What an MLLM answered, and how sure it was of each phrase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """text: the answer; tokens: (where each token ends in it, counted in characters; its probability in 0..1)."""

    text: str
    tokens: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of_tokens(
        cls, tokens: Sequence[int], probabilities: Sequence[float], decode: Callable[[Sequence[int]], str]
    ) -> Answer:
        """From tokens as they came. decode: tokens -> text; what it gives of the first n of them ends the nth."""
        written = decode(tokens)
        text = written.strip()
        before = len(written) - len(written.lstrip())
        ends = [min(len(text), max(0, len(decode(tokens[: n + 1])) - before)) for n in range(len(tokens))]
        return cls(text, tuple(zip(ends, probabilities, strict=True)))

    def sureness(self, phrase: str) -> float | None:
        """How sure the MLLM was of a phrase of its answer: the geometric mean of its tokens' probabilities, in 0..1;
        None where the answer doesn't hold it.

        The mean and not the product: else a trait of three words would seem less sure than one of a single word.
        """
        start = self.text.find(phrase)
        if start < 0:
            return None
        begins = [0, *(end for end, _ in self.tokens)]
        inside = [
            probability
            for begin, (end, probability) in zip(begins, self.tokens, strict=False)
            if end > start and begin < start + len(phrase)
        ]
        if not inside:
            return None
        return math.exp(sum(math.log(max(probability, 1e-9)) for probability in inside) / len(inside))
