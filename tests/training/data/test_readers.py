"""What the stages read with an MLLM is what the nodes read: every family, several histories at once."""

import numpy as np
import pytest
import torch

from prefgen.dtypes import DTYPES
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM
from tests.closeness import assert_close, assert_far
from tests.prefgen import tiny_mllms
from training.common import lora
from training.common.config.schema import Lora
from training.data import readers
from training.data.readers import Conversation, Reader
from training.data.worlds import History

PICTURES = 7


class World:
    """A few random pictures."""

    def pictures(self, numbers):
        return [np.random.default_rng(int(n)).integers(0, 256, (20, 24, 3), dtype=np.uint8) for n in numbers]


def history(numbers, liked, prompts=None):
    return History(np.array(numbers), np.array(liked), prompts or [""] * len(numbers))


HISTORIES = [
    history([0, 1, 2], [True, False, True], ["a boat", "", "a cat"]),
    history([3], [True]),
    history([4, 1, 5, 6, 0], [True, True, False, True, False]),
]


def encoded(mllm, one):
    """As Encode Preference History reads it."""
    images = [torch.from_numpy(p).float() / 255 for p in World().pictures(one.pictures)]
    items = PreferenceHistory.from_images(images, (), one.prompts).items
    judged = tuple(type(i)(i.image, bool(v), i.prompt) for i, v in zip(items, one.liked, strict=True))
    return mllm.encode(PreferenceHistory(judged))


@pytest.fixture(scope="module", params=list(tiny_mllms.FAMILIES))
def mllm(request, tmp_path_factory):
    folder = tiny_mllms.write_folder(tmp_path_factory.mktemp("mllm"), request.param)
    return PreferenceMLLM.load(folder)


def test_histories_of_different_lengths_at_once_are_read_as_each_alone(mllm):
    together = Reader(mllm, World()).states(HISTORIES)
    for states, one in zip(together, HISTORIES, strict=True):
        assert_close(states, encoded(mllm, one))
    assert_far(together[0], together[2])


def test_only_the_answer_is_learnt_and_its_prompt_ends_where_the_node_reads(mllm):
    reader = Reader(mllm, World())
    asked = [Conversation(HISTORIES[0], "What does this user avoid ?", "a boat"), Conversation(HISTORIES[1])]
    batch = reader.batch(asked)
    answer = reader.answer_ids("a boat")
    assert batch.labels[0][batch.labels[0] >= 0].tolist() == answer and (batch.labels[1] == -100).all()
    assert batch.labels[0, batch.last[0] + 1] == answer[0]
    states, last = reader.forward(batch)
    assert_close(states[1], encoded(mllm, HISTORIES[1]), unlike=encoded(mllm, HISTORIES[2]))
    assert_close(last[1, batch.last[1]].float(), states[1, -1])


def test_a_shown_picture_stands_before_its_question_and_matters(mllm):
    reader = Reader(mllm, World())
    would = [Conversation(HISTORIES[0], "What does this user like ?", "", np.array([n])) for n in (5, 6)]
    states = reader.forward(reader.batch(would))[0]
    assert_far(states[0], states[1])
    image, per_picture = mllm.family.image_token_id, mllm.family.tokens_per_image
    written = [mllm.token_ids([(True, "")], "What ?", shown).count(image) for shown in (0, 1, 2)]
    assert written == [per_picture, 2 * per_picture, 3 * per_picture]


def test_gradients_reach_the_lora_of_every_decoder_layer_and_nothing_else(mllm):
    model = mllm.model.requires_grad_(False)
    wanted = Lora(rank=2, dropout=0.0)
    peft_model = lora.put_on(model, mllm.family.text, wanted, 0)
    try:
        reader = Reader(mllm, World())
        batch = reader.batch([Conversation(HISTORIES[0], answer="a boat"), Conversation(HISTORIES[2], answer="a cat")])
        states, _ = reader.forward(batch)
        states.square().sum().backward()
        trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        layers = len(mllm.family.text.layers)
        assert len(trained) == 2 * layers * len(wanted.targets)
        assert all(p.grad is not None and (p.grad.any() or "lora_A" in name) for name, p in trained.items())
        assert not any(part in name for name in trained for part in ("vision", "visual", "connector", "projector"))
    finally:
        peft_model.unload()


def test_targets_that_match_nothing_are_one_sentence(mllm):
    with pytest.raises(lora.LoraError, match="mllm.lora.targets: qkv match nothing in the decoder"):
        lora.targets_of(mllm.model, mllm.family.text, ("q_proj", "qkv"))


def test_tokens_are_kept_as_wide_as_the_precision_that_reads_them():
    """bf16 has no type of its own in numpy: its bits are kept as whole numbers of the same width."""
    assert set(readers.TOKEN_TYPES) == set(DTYPES)
    for name, kind in readers.TOKEN_TYPES.items():
        assert np.dtype(kind).itemsize == DTYPES[name].itemsize
