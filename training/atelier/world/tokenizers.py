"""Stage 0: the two vocabularies, from every word that the world can say, and the note that this is the second edition.

    python -m training.atelier.world.tokenizers

As `training.atelier.tokenizers`, which has the layouts.
"""

from __future__ import annotations

import json

from prefgen.atelier.editions import SECOND, write_note
from prefgen.atelier.models import CLIP_TOKENIZER, MLLM_FOLDER, WEIGHTS
from prefgen.atelier.world.prompts import every_word

from ..tokenizers import write_clip, write_mllm

# What is asked of the MLLM beside the first world's questions.
QUESTIONS = """what does this picture show which of these two would this user like more first second what do the liked
pictures share that the disliked ones lack what is favourite one kind here any other in line with taste none hot air"""


def main() -> None:
    lines = sorted(set(every_word()))
    clip_vocab = write_clip(CLIP_TOKENIZER, lines, SECOND.max_tokens)
    sizes = {"clip_vocab": clip_vocab, "mllm_vocab": write_mllm(MLLM_FOLDER, [*lines, QUESTIONS])}
    write_note(WEIGHTS, SECOND)
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
