"""The control: what the text alone gives away. It must be nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from prefgen.mllm.prompt import verdict_words

from .questions import ANSWERS, Question

WORST = 4.0  # standard errors above chance: one in 30,000 by luck


class TextOnly:
    """Naive Bayes over the words of a conversation without its pictures: the question, the verdicts, the prompts."""

    def __init__(self):
        self.words: dict = defaultdict(lambda: defaultdict(Counter))  # kind -> answer -> word -> questions with it
        self.seen: dict = defaultdict(Counter)  # kind -> answer -> questions

    @staticmethod
    def said(question: Question) -> set[str]:
        history = " ".join(verdict_words(p.liked, p.prompt) for p in question.history)
        prompts = " ".join(f"liked:{word}" for p in question.history if p.liked for word in p.prompt.split())
        return set(f"{question.question} {history} {prompts}".lower().split())

    def learn(self, question: Question) -> None:
        if question.kind in ANSWERS:
            self.seen[question.kind][question.answer] += 1
            self.words[question.kind][question.answer].update(self.said(question))

    def answer(self, question: Question) -> str:
        """The likelier answer to a closed question."""
        words, kind = self.said(question), question.kind
        known = {word for answer in ANSWERS[kind] for word in self.words[kind][answer]}

        def likelihood(answer: str) -> float:
            total, counts = self.seen[kind][answer], self.words[kind][answer]
            shares = {word: (counts[word] + 1) / (total + 2) for word in known}
            return math.log(total + 1) + sum(math.log(s if w in words else 1 - s) for w, s in shares.items())

        return max(ANSWERS[kind], key=likelihood)


def beats_chance(right: int, asked: int) -> bool:
    """Whether so many right answers of two possible ones are more than luck."""
    return asked > 0 and right / asked > 0.5 + WORST * 0.5 / math.sqrt(asked)
