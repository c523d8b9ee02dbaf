"""The vocabularies of the embedded world: every word one token, the same files every time."""

from collections import Counter

from transformers import CLIPTokenizer

from training.atelier.tokenizers import bpe_merges, write_clip


def test_merges_are_those_of_the_papers_own_example():
    # Sennrich et al., arXiv 1508.07909, algorithm 1; of pairs with equal counts the first in the alphabet.
    words = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    merges = bpe_merges(words)
    assert merges[:3] == [("e", "s"), ("es", "t</w>"), ("l", "o")]
    merged = {a + b for a, b in merges}
    assert {word + "</w>" for word in words} <= merged


def test_equal_counts_are_merged_in_the_order_of_the_alphabet():
    assert bpe_merges(Counter({"ba": 1, "dc": 1})) == [("b", "a</w>"), ("d", "c</w>")]
    assert bpe_merges(Counter({"dc": 1, "ba": 1})) == [("b", "a</w>"), ("d", "c</w>")]
    assert bpe_merges(Counter({"aaaa": 1}))[0] == ("a", "a") and bpe_merges(Counter({"a": 3})) == []


def test_a_written_tokenizer_takes_every_word_whole_and_spells_others(tmp_path):
    lines = ["a sailing boat, thick outline", "an owl under a night sky"]
    write_clip(tmp_path / "one", lines)
    write_clip(tmp_path / "two", lines[::-1])
    for name in ("merges.txt", "vocab.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.tokenize("A sailing boat") == ["a</w>", "sailing</w>", "boat</w>"]
    assert len(tokenizer.tokenize("xylophone")) > 1 and tokenizer.unk_token not in tokenizer.tokenize("xylophone")
