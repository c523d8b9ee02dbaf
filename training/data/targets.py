"""What a user likes in words: the texts that e_sem is aligned with, from whatever a world knows.

The paper (arXiv 2512.06020) aligns with CLIP text embeddings of the user's attributes, which simulated users have and
real ones don't. Where there are none:
- traits: what an MLLM answers when it has seen the liked and the disliked pictures (training/data/traits.py);
- prompts: those of the liked pictures. A prompt counts as often as its pictures were liked, times the share of its
  pictures that were: what the user disliked of the same prompt takes away from it. So one whose pictures come in pairs
  of a better and a worse one, as in Pick-a-Pic, says half of what one does that only has liked ones.
"""

from __future__ import annotations

from .worlds import World

ATTRIBUTES, TRAITS, PROMPTS = "attributes", "traits", "prompts"


def target_of(world: World, wanted: str) -> str:
    """Which of the three says this world's tastes: `wanted`, or for "auto" the first that there is."""
    if wanted != "auto":
        return wanted
    if world.attributes:
        return ATTRIBUTES
    return TRAITS if world.traits else PROMPTS


def disliked_text(world: World, target: str, user: int) -> str:
    """What a user dislikes in words, "" where nothing says it. The prompts of disliked pictures don't: what is asked
    for and what came out badly are the same words."""
    if target == ATTRIBUTES:
        return ", ".join(world.phrase(attribute) for attribute in world.dislikes(user))
    return ", ".join(world.traits.get(user, ([], []))[1]) if target == TRAITS else ""


def texts_of(world: World, target: str, user: int) -> list[tuple[str, float]]:
    """(text, weight) of all that says what a user likes, in an order; none for a user of whom nothing is known."""
    if target == ATTRIBUTES:
        return [(text, 1.0) for text in world.texts(user) if text]
    if target == TRAITS:
        liked, _ = world.traits.get(user, ([], []))
        return [(", ".join(liked), 1.0)] if liked else []
    counts = sorted(world.verdicts(user).items())
    return [(prompt, liked * liked / (liked + disliked)) for prompt, (liked, disliked) in counts if liked]
