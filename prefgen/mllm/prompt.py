"""How a history is put into words for the MLLM. Training and inference share this file.

PrefGen's own conversation isn't published (arXiv 2512.06020). As in that of its predecessor (arXiv 2508.08220), every
picture is followed by what the user said of it, with the prompt that it was made from. The exact conversation is part
of a trained MLLM, so a change of wording is a change of PROMPT_VERSION.
"""

from __future__ import annotations

from collections.abc import Sequence

PROMPT_VERSION = 1
CLOSING_QUESTION = "What does this user like?"
AVOID_QUESTION = "What does this user avoid?"


def verdict_words(liked: bool, prompt: str = "") -> str:
    """What follows a picture: "liked", with the prompt it was made from when that is known."""
    verdict = "liked" if liked else "disliked"
    return f"{verdict} ({prompt})" if prompt else verdict


def build_messages(
    verdicts: Sequence[bool],
    prompts: Sequence[str],
    question: str = CLOSING_QUESTION,
    image_token: str | None = None,
    shown: int = 0,
) -> list[dict]:
    """One user turn in transformers' chat format: picture, verdict, picture, verdict, ..., question.

    image_token: written as text in place of a picture, for templates that would put all pictures first. shown: how many
    pictures the question asks about, right before it.
    """
    # The verdict stands behind its picture and the question at the end, since a decoder sees only what came before.
    picture = {"type": "image"} if image_token is None else {"type": "text", "text": image_token}
    content: list[dict] = []
    for liked, prompt in zip(verdicts, prompts, strict=True):
        content += [picture, {"type": "text", "text": verdict_words(liked, prompt)}]
    content += [picture] * shown + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def render_prompt(
    verdicts: Sequence[bool],
    prompts: Sequence[str],
    question: str = CLOSING_QUESTION,
    image_token: str = "<image>",
    tokens_per_image: int = 1,
    shown: int = 0,
    bos: str = "<|im_start|>",
    eou: str = "<end_of_utterance>",
) -> str:
    """The conversation as one string, for tokenizers without a chat template.

    Every picture is `tokens_per_image` image tokens, the `shown` ones that the question asks about too. The text ends
    with the assistant's prompt, whose last token is the one that H is read from.
    """
    items = " ".join(
        image_token * tokens_per_image + " " + verdict_words(liked, prompt)
        for liked, prompt in zip(verdicts, prompts, strict=True)
    )
    asked = (image_token * tokens_per_image + " ") * shown + question
    return f"{bos}User: {items} {asked}{eou}\nAssistant:"
