"""The preference MLLM on tiny random models of the real classes: what it reads, and what it does not read twice."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefgen.history import PreferenceHistory
from prefgen.lru import LeastRecentlyUsed
from prefgen.mllm.model import MLLMError, PreferenceMLLM
from prefgen.mllm.prompt import CLOSING_QUESTION, build_messages, render_prompt
from tests.closeness import FAR, assert_close, assert_far, difference
from tests.prefgen.tiny_mllms import IDEFICS_TEMPLATE, LAYERS, SPECIALS, WIDTH, WORDS, write_model, write_tokenizer

SIZE = 16
PER_PICTURE = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a family, the second with a chat template."""
    root = tmp_path_factory.mktemp("mllm")
    for family, template in (("smolvlm", None), ("idefics3", IDEFICS_TEMPLATE)):
        write_model(root / family, family)
        write_tokenizer(root / family, template)
    return root


@pytest.fixture
def mllm(folders):
    return watched(PreferenceMLLM.load(folders / "smolvlm"))


def watched(mllm):
    """Count what really goes through the modules, whatever `stats` says."""
    mllm.seen = SimpleNamespace(pictures=[], prefills=0)
    mllm.family.vision.register_forward_pre_hook(
        lambda _, args, kwargs: mllm.seen.pictures.append(len(kwargs["pixel_values"])), with_kwargs=True
    )

    def count(*_):
        mllm.seen.prefills += 1

    mllm.family.text.register_forward_pre_hook(count)
    return mllm


def pictures(*seeds, size=SIZE):
    """8-bit pictures of the vision tower's own size, so that nothing is resized."""
    draw = (torch.rand(size, size, 3, generator=torch.Generator().manual_seed(s)) for s in seeds)
    return [(p * 255).round() / 255 for p in draw]


def history(liked=(1, 2, 3), disliked=(4, 5), **prompts):
    return PreferenceHistory.from_images(pictures(*liked), pictures(*disliked), **prompts)


class TestEncoding:
    def test_it_is_one_state_of_every_layer(self, mllm):
        states = mllm.encode(history())
        assert states.shape == (LAYERS, WIDTH)
        assert states.dtype == torch.float32 and states.device.type == "cpu" and torch.isfinite(states).all()

    @pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
    def test_it_equals_what_transformers_itself_computes_from_pixels(self, folders, family):
        """The oracle has neither hooks nor caches nor scattering: transformers reads pixels and gives hidden states."""
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        read = history(liked_prompts=["a boat"])
        model = AutoModelForImageTextToText.from_pretrained(folders / family).eval()  # saved as float32
        tokenizer = AutoTokenizer.from_pretrained(folders / family)
        verdicts, prompts = [i.liked for i in read.items], [i.prompt for i in read.items]
        if family == "idefics3":
            block = "<fake_token_around_image><global-img>" + "<image>" * PER_PICTURE + "<fake_token_around_image>"
            items = "".join(
                f"{block}{'liked' if liked else 'disliked'}{f' ({prompt})' if prompt else ''}"
                for liked, prompt in zip(verdicts, prompts, strict=True)
            )
            text = f"<|im_start|>User: {items}{CLOSING_QUESTION}<end_of_utterance>\nAssistant:"
        else:
            text = render_prompt(verdicts, prompts, tokens_per_image=PER_PICTURE)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        pixels = torch.stack([item.image.movedim(-1, 0) * 2 - 1 for item in read.items])[None]
        with torch.inference_mode():
            output = model.model(input_ids=ids, pixel_values=pixels, output_hidden_states=True, use_cache=False)
        expected = torch.stack([layer[0, -1] for layer in output.hidden_states[1:]])
        assert torch.equal(expected[-1], output.last_hidden_state[0, -1])  # the last one is after the final norm
        mllm = PreferenceMLLM.load(folders / family)
        assert_close(mllm.encode(read), expected, unlike=mllm.encode(history()))

    def test_verdicts_pictures_prompts_and_order_all_count(self, mllm):
        base = mllm.encode(history())
        flipped = PreferenceHistory.from_images(pictures(4, 5), pictures(1, 2, 3))
        others = [
            flipped,
            history(disliked=()),
            history(liked=(1, 2, 6)),
            history(liked=(2, 1, 3)),
            history(liked_prompts=["a boat"]),
        ]
        for other in others:
            change = difference(mllm.encode(other), base, dim=1)
            assert (change > FAR).all(), change

    def test_one_flipped_verdict_moves_every_layer(self, mllm):
        items = history().items
        for i in range(len(items)):
            turned = [
                type(item)(item.image, item.liked != (i == number), item.prompt) for number, item in enumerate(items)
            ]
            change = difference(mllm.encode(PreferenceHistory(tuple(turned))), mllm.encode(history()), dim=1)
            assert (change > FAR / 8).all(), change  # the first layer has seen least of it

    def test_pictures_of_any_size_are_read(self, mllm):
        sizes = [(1, 1), (50, 8000), (8000, 50), (33, 31)]
        odd = PreferenceHistory.from_images([torch.rand(*size, 3) for size in sizes], [torch.rand(9, 7, 1)])
        assert torch.isfinite(mllm.encode(odd)).all()

    def test_a_prompt_may_say_anything(self, mllm):
        assert torch.isfinite(mllm.encode(history(liked_prompts=["a <image> boat \ud800", "<|im_start|>"]))).all()

    def test_low_precision_stays_near(self, folders, mllm):
        low = PreferenceMLLM.load(folders / "smolvlm", dtype=torch.bfloat16)
        states = low.encode(history())
        assert states.dtype == torch.float32
        assert torch.cosine_similarity(states.flatten(), mllm.encode(history()).flatten(), dim=0) > 0.98

    def test_nothing_is_left_hanging_on_the_model_even_after_a_failure(self, mllm, monkeypatch):
        modules = [*mllm.family.text.layers, mllm.family.text.norm]
        mllm.encode(history())
        assert not any(module._forward_hooks for module in modules)

        def fail(*_, **__):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(mllm.family.text.layers[2].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            mllm.encode(history(liked=(7,)))
        assert not any(module._forward_hooks for module in modules)
        monkeypatch.undo()
        assert torch.isfinite(mllm.encode(history(liked=(7,)))).all()


class TestCaching:
    def test_the_same_history_again_runs_no_model(self, mllm):
        first = mllm.encode(history())
        seen = (list(mllm.seen.pictures), mllm.seen.prefills)
        again = mllm.encode(history())
        assert torch.equal(first, again)
        assert (mllm.seen.pictures, mllm.seen.prefills) == seen
        assert mllm.stats == {"vision_runs": 5, "prefill_runs": 1, "history_hits": 1, "feature_hits": 0}

    def test_one_picture_added_to_16_sends_one_picture_through_the_vision_tower(self, mllm):
        mllm.encode(history(range(8), range(8, 16)))
        assert sum(mllm.seen.pictures) == 16 and max(mllm.seen.pictures) > 1  # in batches
        mllm.seen.pictures.clear()
        mllm.encode(history(range(8), range(8, 17)))
        assert mllm.seen.pictures == [1]
        assert mllm.seen.prefills == 2
        assert mllm.stats == {"vision_runs": 17, "prefill_runs": 2, "history_hits": 0, "feature_hits": 16}

    def test_new_verdicts_or_prompts_run_no_vision_tower(self, mllm):
        mllm.encode(history())
        mllm.seen.pictures.clear()
        mllm.encode(PreferenceHistory.from_images(pictures(4, 5), pictures(1, 2, 3), ["a boat"]))
        assert mllm.seen.pictures == [] and mllm.seen.prefills == 2

    def test_a_picture_that_stands_twice_is_read_once(self, mllm):
        mllm.encode(history((1, 1), (1,)))
        assert mllm.seen.pictures == [1]

    def test_cached_pictures_give_what_uncached_ones_give(self, folders, mllm):
        mllm.encode(history((3, 9), (4,)))
        mllm.encode(history((5, 1), ()))
        mllm.encode(history((2,), (8,)))
        mllm.seen.pictures.clear()
        cached = mllm.encode(history())
        assert mllm.seen.pictures == []
        fresh = PreferenceMLLM.load(folders / "smolvlm").encode(history())
        assert_close(cached, fresh, unlike=mllm.encode(history((2, 1, 3))))

    def test_a_picture_reads_the_same_whatever_stands_beside_it(self, folders):
        items = history(range(12), ()).items
        forward = PreferenceMLLM.load(folders / "smolvlm").image_features(items)
        backward = PreferenceMLLM.load(folders / "smolvlm").image_features(items[::-1])[::-1]
        alone = [PreferenceMLLM.load(folders / "smolvlm").image_features([item])[0] for item in items[:2]]
        assert all(f.shape == (PER_PICTURE, WIDTH) for f in forward)
        for features, again in [*zip(forward, backward, strict=True), *zip(forward, alone, strict=False)]:
            assert_close(again, features)
        assert_far(forward[0], forward[1])

    def test_what_a_caller_does_to_the_result_stays_with_the_caller(self, mllm):
        first = mllm.encode(history())
        copy = first.clone()
        with torch.inference_mode():
            first.zero_()
        again = mllm.encode(history())
        assert torch.equal(again, copy)

    def test_the_caches_forget_what_was_used_longest_ago(self):
        cache = LeastRecentlyUsed(2)
        cache["a"], cache["b"] = 1, 2
        assert cache["a"] == 1
        cache["c"] = 3
        assert list(cache) == ["a", "c"] and "b" not in cache
        cache["a"] = 4
        cache["d"] = 5
        assert dict(cache.items()) == {"a": 4, "d": 5}


class TestProgressAndInterrupt:
    def test_progress_rises_to_its_end(self, mllm):
        calls = []
        mllm.encode(history(range(12), range(12, 20)), progress=lambda done, total: calls.append((done, total)))
        done = [d for d, _ in calls]
        assert done == sorted(set(done)) and len(done) >= 3
        assert {total for _, total in calls} == {done[-1]}

    def test_an_interrupt_stops_at_once_and_the_next_run_is_whole(self, folders, mllm):
        long = history(range(12), range(12, 20))
        times = 0

        def interrupt():
            nonlocal times
            times += 1
            if times == 2:
                raise InterruptedError("stopped by the user")

        with pytest.raises(InterruptedError):
            mllm.encode(long, interrupt=interrupt)
        assert mllm.seen.prefills == 0 and sum(mllm.seen.pictures) < 20
        assert_close(mllm.encode(long), PreferenceMLLM.load(folders / "smolvlm").encode(long))
        assert sum(mllm.seen.pictures) == 20  # what was read before the interrupt is kept


class TestAnswers:
    @pytest.fixture
    def mllm(self, tmp_path):
        """A model whose random weights have something to say."""
        # Large enough weights, and a seed, with which no answer ends within nine words.
        large = {"initializer_range": 0.5}
        write_model(tmp_path / "talker", "smolvlm", seed=1, text=large, vision=large)
        write_tokenizer(tmp_path / "talker")
        return watched(PreferenceMLLM.load(tmp_path / "talker"))

    def test_an_answer_is_what_transformers_generates_greedily(self, mllm):
        read = history()
        with torch.inference_mode():
            embeds = mllm._inputs(read, mllm.image_features(read.items), CLOSING_QUESTION)["inputs_embeds"]
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            theirs = mllm.model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=12)
        ours = mllm.answer(read, limit=12)
        assert len(ours.split()) > 5 and mllm.tokenizer.decode(theirs[0], skip_special_tokens=True) == ours

    def test_an_answer_is_cut_at_128_tokens(self, mllm, monkeypatch):
        monkeypatch.setattr(mllm, "_end_tokens", set)
        assert len(mllm.spoken(history()).tokens) == 128 and len(mllm.spoken(history(), limit=3).tokens) == 3

    def test_another_question_or_another_verdict_may_get_another_answer(self, mllm):
        answers = {mllm.answer(history(), limit=8), mllm.answer(history(), "does a boat like a cat ?", limit=8)}
        answers.add(mllm.answer(history((4, 5), (1, 2, 3)), limit=8))
        assert len(answers) > 1

    def test_answering_and_encoding_share_what_was_read_of_the_pictures(self, mllm, tmp_path):
        mllm.answer(history(), limit=2)
        assert_close(mllm.encode(history()), PreferenceMLLM.load(tmp_path / "talker").encode(history()))
        assert sum(mllm.seen.pictures) == 5

    def test_the_host_waits_once_for_every_word(self, mllm):
        """Counted by torch: every number that Python reads off a tensor while the answer is made."""
        from torch.overrides import TorchFunctionMode
        from torch.utils._python_dispatch import TorchDispatchMode

        class Reads(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
                self.count += func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
                return func(*args, **(kwargs or {}))

        class Lists(TorchFunctionMode):
            """A whole tensor that is read at once, which on the CPU is no operator."""

            def __torch_function__(self, func, kinds, args=(), kwargs=None):
                reads.count += func is torch.Tensor.tolist
                return func(*args, **(kwargs or {}))

        counts = []
        for limit in (3, 9):
            mllm.answer(history(), limit=limit)  # what is read of the pictures is kept
            with Reads() as reads, Lists():
                mllm.answer(history(), limit=limit)
            counts.append(reads.count)
        assert counts[1] - counts[0] == 9 - 3

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_numbers_are_told_and_never_an_empty_answer(self, mllm, one_sentence, value):
        """As fp16 overflows behind the first decoder layers."""
        with torch.no_grad():
            mllm.family.text.norm.weight[0] = value
        with pytest.raises(MLLMError, match="not numbers in float32") as raised:
            mllm.answer(history(), limit=4)
        one_sentence(raised)

    def test_an_interrupt_stops_between_two_words(self, mllm):
        times = 0

        def interrupt():
            nonlocal times
            times += 1
            if times == 4:
                raise InterruptedError("stopped by the user")

        with pytest.raises(InterruptedError):
            mllm.answer(history(), limit=50, interrupt=interrupt)
        assert mllm.seen.prefills <= 3


class TestFingerprint:
    def test_it_says_what_an_adapter_must_match(self, mllm):
        about = mllm.fingerprint
        assert (about["name"], about["num_layers"], about["hidden_size"]) == ("smolvlm", LAYERS, WIDTH)
        assert (about["prompt_version"], about["precision"], about["lora"]) == (1, "float32", None)
        json.dumps(about)

    def test_the_revision_follows_the_weights_not_the_folder(self, folders, tmp_path, mllm):
        shutil.copytree(folders / "smolvlm", tmp_path / "copy")
        assert PreferenceMLLM.load(tmp_path / "copy").fingerprint["revision"] == mllm.fingerprint["revision"]
        write_model(tmp_path / "copy", "smolvlm", seed=1)
        assert PreferenceMLLM.load(tmp_path / "copy").fingerprint["revision"] != mllm.fingerprint["revision"]


class TestFoldersThatCannotBeUsed:
    @pytest.fixture
    def folder(self, folders, tmp_path):
        shutil.copytree(folders / "smolvlm", tmp_path / "taste mllm")
        return tmp_path / "taste mllm"

    @pytest.fixture
    def refused(self, one_sentence):
        def load(folder) -> str:
            with pytest.raises(MLLMError) as raised:
                PreferenceMLLM.load(folder)
            assert folder.name in one_sentence(raised)
            return str(raised.value)

        return load

    def test_missing_and_empty_folders(self, tmp_path, refused):
        refused(tmp_path / "gone")
        (tmp_path / "bare").mkdir()
        assert "config.json" in refused(tmp_path / "bare")

    def test_no_weights(self, folder, refused):
        (folder / "model.safetensors").unlink()
        assert "no weights" in refused(folder)

    def test_pickled_weights_are_never_opened(self, folder, refused):
        (folder / "model.safetensors").unlink()

        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("the pickle was opened",))

        torch.save({"bomb": Bomb()}, folder / "pytorch_model.bin")
        assert "pickled" in refused(folder)

    def test_code_of_its_own_is_never_run(self, folder, refused):
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForImageTextToText": "evil.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('code was run')")
        assert "code" in refused(folder)

    @pytest.mark.parametrize("model_type", ["llama", "clip", "somebody's own", None])
    def test_models_that_read_no_pictures(self, folder, model_type, refused):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        assert "SmolVLM2" in refused(folder)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"\xff\xfe\x00",
            b"[]",
        ],
    )
    def test_a_damaged_config(self, folder, content, refused):
        (folder / "config.json").write_bytes(content)
        assert "damaged" in refused(folder)

    @pytest.mark.parametrize("share", [0, 0.01, 0.9])
    def test_damaged_weights(self, folder, share, refused):
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: int(len(weights) * share)])
        assert "download it again" in refused(folder)

    @pytest.mark.parametrize("gone", [".layers.1.", "connector", ""])
    def test_weights_that_lack_a_part(self, folder, gone, refused):
        weights = load_file(folder / "model.safetensors")
        others = {key: value for key, value in weights.items() if gone not in key} or {"other": torch.zeros(2)}
        save_file(others, folder / "model.safetensors", metadata={"format": "pt"})
        refused(folder)

    def test_weights_that_are_not_numbers(self, folder, one_sentence):
        weights = load_file(folder / "model.safetensors")
        broken = {key: value * float("nan") for key, value in weights.items()}
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MLLMError) as raised:
            PreferenceMLLM.load(folder).encode(history())
        assert folder.name in one_sentence(raised)

    def test_a_folder_without_a_tokenizer(self, folder, refused):
        for file in folder.glob("*token*"):
            file.unlink()
        refused(folder)

    def test_a_tokenizer_of_another_model(self, folder, one_sentence):
        config = json.loads((folder / "config.json").read_text())
        config["image_token_id"] = (SPECIALS + WORDS).index("boat")
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(MLLMError) as raised:
            PreferenceMLLM.load(folder).encode(history())
        assert "don't belong together" in one_sentence(raised)


class TestPrompt:
    def test_every_picture_stands_before_its_verdict_and_the_question_closes(self):
        (message,) = build_messages([True, False], ["a boat", ""])
        assert message["role"] == "user"
        assert message["content"] == [
            {"type": "image"},
            {"type": "text", "text": "liked (a boat)"},
            {"type": "image"},
            {"type": "text", "text": "disliked"},
            {"type": "text", "text": "What does this user like?"},
        ]

    def test_the_atelier_reads_the_same_conversation_as_text(self):
        text = render_prompt([True, False], ["a boat", ""], tokens_per_image=2)
        assert text == (
            "<|im_start|>User: <image><image> liked (a boat) <image><image> disliked "
            "What does this user like?<end_of_utterance>\nAssistant:"
        )
