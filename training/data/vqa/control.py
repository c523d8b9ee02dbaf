"""The control: what the text alone gives away. It must be nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from prefgen.mllm.prompt import verdict_words

from .questions import ANSWERS, Question

MARGIN = 4.0  # standard errors above chance: one in 30,000 by luck


class TextOnly:
    """Bernoulli naive Bayes over the words of a conversation without its pictures: the question, the verdicts, the
    prompts. It learns question by question, so that a set of any size needs no more memory than its words."""

    def __init__(self):
        # kind -> answer -> how many questions, and how many with each word
        self.questions: dict[str, Counter] = defaultdict(Counter)
        self.words: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))

    def learn(self, question: Question) -> None:
        """Count one question with its answer; an open one says nothing."""
        if question.kind in ANSWERS:
            self.questions[question.kind][question.answer] += 1
            self.words[question.kind][question.answer].update(words_of(question))

    def answer(self, question: Question) -> str:
        """The likelier answer to a closed question."""
        words = words_of(question)
        counts = self.words[question.kind]
        vocabulary = {word for answer in ANSWERS[question.kind] for word in counts[answer]}

        def log_likelihood(answer: str) -> float:
            total = self.questions[question.kind][answer]
            # Laplace's smoothing: no word is impossible because training had it with one answer only.
            shares = {word: (counts[answer][word] + 1) / (total + 2) for word in vocabulary}
            return math.log(total + 1) + sum(
                math.log(share if word in words else 1 - share) for word, share in shares.items()
            )

        return max(ANSWERS[question.kind], key=log_likelihood)


def words_of(question: Question) -> set[str]:
    """What the text of a conversation says; a liked prompt's words count apart from those of a disliked one."""
    history = " ".join(verdict_words(picture.liked, picture.prompt) for picture in question.history)
    liked = " ".join(f"liked:{word}" for p in question.history if p.liked for word in p.prompt.split())
    return set(f"{question.question} {history} {liked}".lower().split())


def beats_chance(right: int, asked: int) -> bool:
    """Whether so many right answers of two possible ones are more than luck."""
    return asked > 0 and right / asked > 0.5 + MARGIN * 0.5 / math.sqrt(asked)
