"""Stage 2: the two vocabularies, from every word that the world can say.

    python -m training.atelier.tokenizers

CLIP gets an ordinary BPE (`vocab.json`, `merges.txt`), the layout that transformers' CLIPTokenizer and ComfyUI read.
The MLLM gets a word-level tokenizer with the chat's special tokens. Both hold the letters too, so that a word from
outside the world is spelled instead of lost.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from prefgen.atelier.captions import corpus
from prefgen.atelier.editions import FIRST
from prefgen.atelier.models import CLIP_TOKENIZER, MLLM_FOLDER
from prefgen.files import write_atomic

CLIP_SPECIALS = ["<|startoftext|>", "<|endoftext|>"]
MLLM_SPECIALS = [
    "<pad>",
    "<unk>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
]
# Words of the conversation itself: roles, verdicts, questions and answers.
CONVERSATION = """user assistant liked disliked what does this user like avoid which would picture yes no nothing in
particular is not and or the of a an in do pictures share taste : ? , . ( ) ; ! likes avoids unsure describe both"""


END_OF_WORD = "</w>"


def main() -> None:
    lines = sorted(set(corpus()))
    sizes = {"clip_vocab": write_clip(CLIP_TOKENIZER, lines), "mllm_vocab": write_mllm(MLLM_FOLDER, lines)}
    print(json.dumps(sizes))


def write_clip(folder: Path, lines: list[str], max_tokens: int = FIRST.max_tokens) -> int:
    """Write CLIP's tokenizer as a folder of transformers. Returns how many tokens it knows."""
    bpe = clip_bpe(lines)
    write_atomic(folder / "vocab.json", json.dumps(bpe["vocab"], ensure_ascii=False).encode())
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in bpe["merges"])
    write_atomic(folder / "merges.txt", merges.encode())
    start, end = CLIP_SPECIALS
    specials = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    config = specials | {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_tokens, "do_lower_case": True}
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=1).encode())
    write_atomic(folder / "special_tokens_map.json", json.dumps(specials, indent=1).encode())
    return len(bpe["vocab"])


def clip_bpe(lines: list[str]) -> dict:
    """Byte-level BPE with CLIP's end-of-word suffix, trained until every word of the world is one token."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    words = Counter(word for line in lines for word, _ in splitter.pre_tokenize_str(line.lower()))
    merges = bpe_merges(words)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # CLIP's own order: letters, letters that end a word, merges, specials last.
    tokens = sorted(alphabet) + [c + END_OF_WORD for c in sorted(alphabet)] + [a + b for a, b in merges] + CLIP_SPECIALS
    return {"vocab": {token: i for i, token in enumerate(dict.fromkeys(tokens))}, "merges": merges}


def bpe_merges(words: Counter) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding (Sennrich et al., arXiv 1508.07909) until every word is one token.

    The trainer of the tokenizers library takes pairs of equal count in an order that changes from run to run; here the
    first in the alphabet is taken, so that the same world always gives the same files.
    """
    pieces = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in words}
    merges = []
    while pairs := _pair_counts(pieces, words):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            pieces[word] = _merged(parts, best)
    return merges


def _pair_counts(pieces: dict[str, list[str]], words: Counter) -> Counter:
    pairs: Counter = Counter()
    for word, parts in pieces.items():
        for pair in zip(parts, parts[1:], strict=False):
            pairs[pair] += words[word]
    return pairs


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts of a word with every occurrence of a pair as one part, from left to right."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def write_mllm(folder: Path, lines: list[str]) -> int:
    """Write the MLLM's tokenizer as a folder of transformers. Returns how many tokens it knows."""
    split = pre_tokenizers.Whitespace()
    words = {w for line in [*lines, CONVERSATION] for w, _ in split.pre_tokenize_str(line.lower())}
    letters = {chr(c) for c in range(33, 127)}
    vocab = {w: i for i, w in enumerate(MLLM_SPECIALS + sorted((words | letters) - set(MLLM_SPECIALS)))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(MLLM_SPECIALS)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "additional_special_tokens": MLLM_SPECIALS[4:],
        "model_max_length": 2048,
        "padding_side": "left",
    }
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=1).encode())
    return len(vocab)


if __name__ == "__main__":
    main()
