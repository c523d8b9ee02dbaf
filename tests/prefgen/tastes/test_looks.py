"""Where a taste is least sure: against a loop that does by hand what the module does at once."""

import errno

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save

from prefgen.tastes import looks


def made_up(count: int, width: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return {f"{n:064x}": looks.unit(vector) for n, vector in enumerate(vectors)}


def cosine(one, other) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.fixture
def scene():
    """(embeddings, verdicts of the first nine, the others)."""
    embeddings = made_up(14)
    names = list(embeddings)
    verdicts = {name: "liked" if n % 3 else "disliked" for n, name in enumerate(names[:9])}
    return embeddings, verdicts, names[9:]


def test_the_difference_is_that_of_the_cosines_to_both_means(scene):
    embeddings, verdicts, candidates = scene
    means = {
        side: np.mean([embeddings[name] for name, verdict in verdicts.items() if verdict == side], 0)
        for side in ("liked", "disliked")
    }
    expected = {
        name: cosine(embeddings[name], means["liked"]) - cosine(embeddings[name], means["disliked"])
        for name in candidates
    }
    assert looks.differences(embeddings, verdicts, [*candidates, "unseen"]) == pytest.approx(expected, abs=1e-5)


def test_the_agreement_is_leave_one_out_with_both_sides_counting_alike(scene):
    embeddings, verdicts, _ = scene
    right = {"liked": [], "disliked": []}
    for left_out, verdict in verdicts.items():
        rest = {name: value for name, value in verdicts.items() if name != left_out}
        [difference] = looks.differences(embeddings, rest, [left_out]).values()
        right[verdict].append((difference > 0) == (verdict == "liked"))
    assert looks.agreement(embeddings, verdicts) == pytest.approx(np.mean([np.mean(side) for side in right.values()]))


def test_two_heaps_are_settled_and_noise_is_not():
    embeddings = made_up(400)
    verdicts = {name: "liked" if n % 2 else "disliked" for n, name in enumerate(embeddings)}
    assert 0.3 < looks.agreement(embeddings, verdicts) < 0.7
    pull = np.eye(8, dtype=np.float32)[0] * 5
    apart = {name: looks.unit(v + pull * (1 if verdicts[name] == "liked" else -1)) for name, v in embeddings.items()}
    assert looks.agreement(apart, verdicts) == 1.0


@pytest.mark.parametrize("verdicts", [{}, {"a": "liked"}, {"a": "disliked", "b": "disliked", "c": "disliked"}])
def test_a_side_without_pictures_says_nothing(verdicts):
    embeddings = dict(zip("abc", made_up(3).values(), strict=True))
    assert looks.differences(embeddings, verdicts, ["a"]) == {} and looks.agreement(embeddings, verdicts) is None


def test_embeddings_come_back_each_encoder_apart_and_bounded(tmp_path, monkeypatch):
    assert looks.load(tmp_path) == {} and looks.known_to(tmp_path, "x") == set()
    first = made_up(3)
    looks.keep(tmp_path, "x", first)
    loaded = looks.load(tmp_path)
    assert all(np.allclose(loaded[name], first[name], atol=1e-3) for name in first)
    looks.keep(tmp_path, "y", {"other": np.ones(4)})
    assert looks.known_to(tmp_path, "x") == set(first) and looks.known_to(tmp_path, "y") == {"other"}
    monkeypatch.setattr(looks, "MOST", 3)
    names = list(first)
    looks.keep(tmp_path, "x", {"new": np.ones(8)}, needed=names[:1])
    assert looks.known_to(tmp_path, "x") == {names[0], "new"}


def test_a_damaged_file_is_looked_past_and_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    looks.keep(tmp_path, "x", made_up(2))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(looks, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        looks.keep(tmp_path, "x", {"new": np.ones(8)})
    monkeypatch.undo()
    assert len(looks.known_to(tmp_path, "x")) == 2
    (tmp_path / ".looks" / "x.safetensors").write_bytes(b"nonsense")
    assert looks.load(tmp_path) == {}
    looks.keep(tmp_path, "x", {"new": np.ones(8)})
    assert looks.known_to(tmp_path, "x") == {"new"}


def test_a_file_of_other_hands_is_read_as_far_as_it_holds_embeddings(tmp_path):
    """Two widths in one file, states in place of an embedding, NaN: comparing them ended the panel."""
    path = tmp_path / ".looks" / "x.safetensors"
    path.parent.mkdir()
    right = made_up(2)
    odd = {"wide": np.ones(9), "states": np.ones((3, 8)), "nan": np.full(8, np.nan), "none": np.ones(0)}
    save_file({name: np.asarray(vector, np.float32) for name, vector in (right | odd).items()}, path)
    assert set(looks.load(tmp_path)) == set(right) == looks.known_to(tmp_path, "x")
    looks.keep(tmp_path, "x", {"new": np.ones(8)})
    assert looks.known_to(tmp_path, "x") == {*right, "new"}
    path.write_bytes(save({"small": torch.ones(8).to(torch.float8_e4m3fn)}))
    assert looks.load(tmp_path) == {}
