"""The engine's small parts by their definitions: files, the cache, the conversation as text, the image part."""

import pytest
import torch

from prefgen.compat import dtype_option
from prefgen.files import write_atomic
from prefgen.image_encoder import described, likeness, weights_digest
from prefgen.lru import LeastRecentlyUsed
from prefgen.mllm.prompt import CLOSING_QUESTION, render_prompt, verdict_words
from prefgen.pooling import pool_image_embeds


def test_a_file_that_cannot_be_replaced_stays_and_the_reason_is_raised(tmp_path):
    folder = tmp_path / "taken"
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(folder, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and (folder / "inside").is_dir()
    write_atomic(tmp_path / "new/folders/file", b"whole")
    assert (tmp_path / "new/folders/file").read_bytes() == b"whole"
    assert (tmp_path / "new/folders/file").stat().st_mode & 0o777 == 0o644
    assert len(list((tmp_path / "new/folders").iterdir())) == 1


def test_the_cache_forgets_what_was_used_longest_ago():
    cache = LeastRecentlyUsed(2)
    cache["a"], cache["b"] = 1, 2
    assert cache["a"] == 1
    cache["c"] = 3
    assert set(cache) == {"a", "c"}
    cache["a"] = 4
    cache["d"] = 5
    assert dict(cache.items()) == {"a": 4, "d": 5}
    cache.size = 1
    cache["e"] = 6
    assert list(cache) == ["e"]


def test_the_conversation_without_a_template_shows_the_historys_pictures_and_those_that_are_asked_about():
    words = [verdict_words(True, "a boat"), verdict_words(False, "")]
    start = f"<|im_start|>User: <image> {words[0]} <image> {words[1]} "
    assert render_prompt([True, False], ["a boat", ""]) == f"{start}{CLOSING_QUESTION}<end_of_utterance>\nAssistant:"
    several = render_prompt([True, False], ["a boat", ""], "Which?", "<p>", 3, 2, "[", "]")
    pictures = "<p><p><p>"
    shown = f"{pictures} {pictures} Which?"
    assert several == f"[User: {pictures} {words[0]} {pictures} {words[1]} {shown}]\nAssistant:"


@pytest.mark.parametrize("push", [0.0, 0.5, 1.0])
def test_the_image_part_is_the_mean_of_unit_embeddings_pushed_away_from_the_disliked(push):
    generator = torch.Generator().manual_seed(0)
    liked = torch.randn(3, 5, generator=generator) * torch.tensor([[1.0], [10.0], [0.1]])
    disliked = torch.randn(2, 5, generator=generator) * torch.tensor([[1.0], [7.0]])

    def mean(rows):
        return sum(row / row.norm() for row in rows.double()) / len(rows)

    expected = mean(liked) - push * mean(disliked)
    pooled = pool_image_embeds(liked, disliked, push)
    torch.testing.assert_close(pooled.double(), expected / expected.norm(), rtol=1e-5, atol=1e-6)
    without = mean(liked) / mean(liked).norm()
    for none in (None, disliked[:0]):
        torch.testing.assert_close(pool_image_embeds(liked, none, push).double(), without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("version", "keyword"),
    [("4.50.3", "torch_dtype"), ("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("4.57.6", "dtype"), ("5.20", "dtype")],
)
def test_the_precision_goes_by_the_keyword_of_the_installed_transformers(monkeypatch, version, keyword):
    import transformers

    monkeypatch.setattr(transformers, "__version__", version)
    assert dtype_option(torch.bfloat16) == {keyword: torch.bfloat16}


def test_embeddings_of_other_widths_are_nothing_alike():
    assert likeness([1.0, 0.0], [1.0, 0.0]) == 1.0 and likeness([1.0, 0.0], [1.0, 0.0, 0.0]) == 0.0


def test_weights_that_are_not_there_have_no_digest():
    names = ("vision_model.embeddings.class_embedding", "vision_model.encoder.weight", "visual_projection.weight")
    weights = {name: torch.rand(8, 8, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
    assert weights_digest(weights) and "digest" in described(weights)
    assert weights_digest({name: weight.to("meta") for name, weight in weights.items()}) is None
    assert weights_digest({name: weight.bfloat16() for name, weight in weights.items()}) is None
    assert "digest" not in described({name: weight.bfloat16() for name, weight in weights.items()})
