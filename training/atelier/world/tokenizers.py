"""Stage 0: the two vocabularies, from every word that the world can say.

    python -m training.atelier.world.tokenizers

As `training.atelier.tokenizers`, which has the layouts.
"""

from __future__ import annotations

import json

from prefgen.atelier.models import CLIP_TOKENIZER, MLLM_FOLDER
from prefgen.atelier.world.models import MAX_TOKENS
from prefgen.atelier.world.prompts import every_word

from ..tokenizers import write_clip, write_mllm

# What is asked of the MLLM beside the first world's questions.
QUESTIONS = """what does this picture show which of these two would this user like more first second what do the liked
pictures share that the disliked ones lack what is favourite one kind here any other in line with taste none hot air"""


def main() -> None:
    lines = sorted(set(every_word()))
    clip_vocab = write_clip(CLIP_TOKENIZER, lines, MAX_TOKENS)
    sizes = {"clip_vocab": clip_vocab, "mllm_vocab": write_mllm(MLLM_FOLDER, [*lines, QUESTIONS])}
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
