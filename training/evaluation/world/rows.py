"""The rows of the second edition, and the lines that they were to cross before they were trained.

docs/evidence/second_edition.md names them; the order is its order.
"""

from __future__ import annotations

from dataclasses import dataclass

METHOD = "prefgen"  # the arm of the method itself
PARTNERS = 3


@dataclass(frozen=True)
class Row:
    """One way of painting.

    arm: of `arms.ARMS`, whose adapter and MLLM paint and speak; "" for none. user: whether the branch paints with the
    user. words: the taste in the prompt, as the "mllm" says it or as it is "true"; negative: what is avoided as
    negative prompt; emphasis: weight of those words, as ComfyUI's `(words:1.3)`. traits: true trait tokens. drawn: by
    the renderer, "oracle" or "cloner". reference: weight of the history's pictures in reference attention. of_others:
    painted with the histories of PARTNERS other users.
    """

    label: str
    arm: str = ""
    user: bool = False
    words: str = ""
    negative: bool = False
    emphasis: float = 1.0
    traits: bool = False
    drawn: str = ""
    reference: float = 0.0
    of_others: bool = False

    @property
    def partners(self) -> int:
        """How many users' histories a picture of this row is painted with, one after the other."""
        return PARTNERS if self.of_others else 1


def adapted(label: str, arm: str) -> Row:
    """The branch of an arm."""
    return Row(label, arm, user=True)


METHODS = {
    "none": Row("no preference"),
    "mismatched": Row("another user's preference", METHOD, user=True, of_others=True),
    "cloner": Row("a liked picture's look, drawn", drawn="cloner"),
    "image_only": adapted("image-only adapter with an aligner of its own", "image_only"),
    "pooled_tokens": adapted("pooled image tokens, no decoder", "pooled_tokens"),
    "words": Row("the MLLM's words", METHOD, words="mllm"),
    "words_negative": Row("the MLLM's words, with negatives", METHOD, words="mllm", negative=True),
    "words_emphasis": Row("the MLLM's words, emphasised", METHOD, words="mllm", negative=True, emphasis=1.3),
    "reference": Row("reference attention", reference=0.3),
    "captioning": adapted("MLLM that captions, not tuned on preference", "captioning"),
    "prefgen": adapted("PrefGen", METHOD),
    "prefgen_words": Row("PrefGen and the MLLM's words", METHOD, user=True, words="mllm", negative=True),
    "words_oracle": Row("true taste in words", words="true", negative=True),
    "trait_oracle": Row("true taste in trait tokens", traits=True),
    "render_oracle": Row("true taste, drawn", drawn="oracle"),
}
RETRAINED = {
    "no_core": adapted("without e_core", "no_core"),
    "no_semantic": adapted("without e_sem", "no_semantic"),
    "no_dislikes": adapted("without dislikes", "no_dislikes"),
    "paired": adapted("the paired term alone", "paired"),
    "no_image": adapted("without e_img", "no_image"),
    "last_layer": adapted("the last layer alone", "last_layer"),
    "words_teacher": adapted("taught by words", "words_teacher"),
    "no_teacher": adapted("taught by pictures alone", "no_teacher"),
    "blind_image": adapted("from verdicts alone: image-only", "blind_image"),
    "blind": adapted("from verdicts alone: e_core and e_img", "blind"),
}
ROWS = METHODS | RETRAINED
# What is tuned on the choosing users, read by judge A: {row: {field of Row: what is tried}}.
TUNED: dict[str, dict[str, tuple[float, ...]]] = {
    "reference": {"reference": (0.1, 0.3, 1.0)},
    "words_emphasis": {"emphasis": (1.1, 1.3, 1.5)},
}


@dataclass(frozen=True)
class Line:
    """PrefGen less a row has to be `least` or more, in a measure, over some users.

    measure: "harmonic", or a part of alignment ("all", "continuous", "said": named and semantic together), "kid",
    "balance" of two tastes. users: "all", or those with "habits". sizes: histories of so many pictures of a verdict.
    of: the row that has to be better, where it isn't PrefGen's.
    """

    idea: str
    row: str
    measure: str
    least: float
    users: str = "all"
    sizes: tuple[int, ...] = (8,)
    of: str = METHOD


PRIMARY = (
    Line("over the MLLM's words", "words_negative", "harmonic", 0.05),
    Line("over the words-oracle", "words_oracle", "harmonic", 0.0),
    Line("over the cloner", "cloner", "harmonic", 0.0),
)
IDEAS = (
    Line("e_core", "no_core", "continuous", 0.05),
    Line("e_sem", "no_semantic", "said", 0.05),
    Line("the MLLM", "pooled_tokens", "harmonic", 0.05, "habits"),
    Line("preference tuning", "captioning", "harmonic", 0.05),
    Line("dislikes", "no_dislikes", "harmonic", 0.05, "habits"),
    Line("MMD", "paired", "balance", 0.0, sizes=(1, 2)),
    Line("e_img", "no_image", "harmonic", 0.03, sizes=(1, 2)),
    Line("layers", "last_layer", "harmonic", 0.0),
    Line("ratings alone: e_img", "mismatched", "all", 0.0, of="blind_image"),
    Line("ratings alone: e_core and e_img", "mismatched", "all", 0.0, of="blind"),
)
