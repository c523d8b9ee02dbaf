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


def main() -> None:
    lines = sorted(set(every_word()))
    sizes = {"clip_vocab": write_clip(CLIP_TOKENIZER, lines, MAX_TOKENS), "mllm_vocab": write_mllm(MLLM_FOLDER, lines)}
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
