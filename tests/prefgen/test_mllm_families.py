"""Every MLLM family as a tiny random model: our one path against transformers' own forward, caches and paddings."""

import pytest
import torch

from prefgen.compat import decoder_of, hidden_states_of, transformers_knows
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import MLLMError, PreferenceMLLM
from prefgen.mllm.prompt import CLOSING_QUESTION
from tests.closeness import FAR, assert_close, difference
from tests.prefgen.tiny_mllms import FAMILIES, LAYERS, SPECIALS, WIDTH, config_of, write_folder, write_tokenizer

LIKED, DISLIKED = (1, 2, 3), (4, 5)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """The folder of each family that the installed transformers has."""
    if not transformers_knows(FAMILIES[request.param][0]):
        pytest.skip("the installed transformers doesn't have this family; another test reads what is said then")
    return write_folder(tmp_path_factory.mktemp("mllm") / request.param, request.param)


@pytest.fixture
def mllm(folder):
    return PreferenceMLLM.load(folder)


def pictures(seeds, size):
    """8-bit pictures of the family's own size, so that nothing is resized."""
    draw = (torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
    return [(picture * 255).round() / 255 for picture in draw]


def history(mllm, liked=LIKED, disliked=DISLIKED, **prompts):
    size = mllm.family.image_size
    return PreferenceHistory.from_images(pictures(liked, size), pictures(disliked, size), **prompts)


class Theirs:
    """transformers' own whole forward: it makes patches, features, positions and padding; none of our code runs."""

    def __init__(self, folder):
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        self.family = folder.name
        self.model_type, self.image_token, *_ = FAMILIES[self.family]
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, read, per_picture):
        """The conversation spelt out by hand."""
        picture = self.image_token * per_picture
        words = [("liked" if i.liked else "disliked") + (f" ({i.prompt})" if i.prompt else "") for i in read.items]
        if self.model_type.startswith("qwen"):
            items = "".join(f"<|vision_start|>{picture}<|vision_end|>{said}" for said in words)
            text = f"<|im_start|>user\n{items}{CLOSING_QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        elif self.model_type == "llava_onevision":
            items = "".join(f"\n{picture}\n{said}" for said in words)
            text = f"<|im_start|>user {items}\n{CLOSING_QUESTION}<|im_end|><|im_start|>assistant\n"
        else:
            fake, global_image = "<fake_token_around_image>", "" if self.model_type == "idefics2" else "<global-img>"
            items = "".join(f"{fake}{global_image}{picture}{fake}{said}" for said in words)
            text = f"<|im_start|>User: {items}{CLOSING_QUESTION}<end_of_utterance>\nAssistant:"
        return torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])

    def pixels(self, read, mean, std):
        """The vision arguments, by transformers' own image processor where it cuts pictures."""
        if self.model_type.startswith("qwen"):
            from PIL import Image
            from transformers import Qwen2VLImageProcessor

            patch = self.model.config.vision_config.patch_size
            processor = Qwen2VLImageProcessor(
                patch_size=patch, min_pixels=64, max_pixels=10**6, image_mean=mean, image_std=std, do_resize=False
            )
            images = [Image.fromarray((i.image * 255).round().byte().numpy()) for i in read.items]
            cut = processor(images=images, return_tensors="pt")
            return {"pixel_values": cut["pixel_values"], "image_grid_thw": cut["image_grid_thw"]}
        pixels = torch.stack([((i.image - torch.tensor(mean)) / torch.tensor(std)).movedim(-1, 0) for i in read.items])
        if self.model_type != "llava_onevision":
            return {"pixel_values": pixels[None]}
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return {"pixel_values": pixels[:, None], "image_sizes": sizes, "batch_num_images": torch.tensor([len(pixels)])}

    def states(self, ids, vision, mask=None):
        """[T, layers, D] of the only history, with the last layer after the final norm."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask} | vision
        if self.model_type.startswith("qwen"):
            import inspect

            model = getattr(self.model, "model", self.model)
            if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
                place = ids == self.tokenizer.convert_tokens_to_ids(self.image_token)
                inputs["mm_token_type_ids"] = place.int()
        outputs = {}
        text = decoder_of(self.model)
        taps = [*text.layers[:-1], text.norm]
        hooks = [
            tap.register_forward_hook(lambda _m, _i, out, n=n: outputs.update({n: hidden_states_of(out)}))
            for n, tap in enumerate(taps)
        ]
        with torch.inference_mode():
            self.model(**inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack([outputs[n][0] for n in range(len(taps))], 1)


def skip_old_llava(folder):
    import inspect

    from transformers import LlavaOnevisionForConditionalGeneration as Llava

    if folder.name == "LLaVA-OneVision" and "batch_num_images" not in inspect.signature(Llava.forward).parameters:
        pytest.skip("this transformers can't read several LLaVA-OneVision pictures as one tile each")


def test_it_equals_what_transformers_itself_computes_from_pixels(folder, mllm):
    skip_old_llava(folder)
    theirs, read = Theirs(folder), history(mllm, liked_prompts=["a boat"])
    ids = theirs.ids(read, mllm.family.tokens_per_image)
    expected = theirs.states(ids, theirs.pixels(read, mllm.family.mean, mllm.family.std))[-1]
    states = mllm.encode(read)
    assert states.shape == (LAYERS, WIDTH)
    assert_close(states, expected, unlike=mllm.encode(history(mllm)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_history_gives_the_same_state_as_ours_which_is_never_padded(folder, mllm, side):
    skip_old_llava(folder)
    theirs, read = Theirs(folder), history(mllm)
    ids, pad = theirs.ids(read, mllm.family.tokens_per_image), torch.zeros(1, 7, dtype=torch.long)
    mask = torch.ones_like(ids)
    order = (pad, ids) if side == "left" else (ids, pad)
    masks = (pad, mask) if side == "left" else (mask, pad)
    vision = theirs.pixels(read, mllm.family.mean, mllm.family.std)
    states = theirs.states(torch.cat(order, 1), vision, torch.cat(masks, 1))
    last = states[-1] if side == "left" else states[ids.shape[1] - 1]
    assert_close(mllm.encode(read), last, unlike=mllm.encode(history(mllm, (2, 1, 3))))


def test_cached_and_uncached_encodings_are_equal_in_any_order_of_caching(folder, mllm):
    expected, unlike = mllm.encode(history(mllm)), mllm.encode(history(mllm, (2, 1, 3)))
    for first in [((5, 1), (9,)), ((4,), (2, 3)), ((3, 2, 1), (5, 4))]:
        other = PreferenceMLLM.load(folder)
        other.encode(history(other, *first))
        runs = other.stats["vision_runs"]
        assert_close(other.encode(history(other)), expected, unlike=unlike)
        assert other.stats["vision_runs"] == runs + len({1, 2, 3, 4, 5} - {*first[0], *first[1]})
    assert_close(PreferenceMLLM.load(folder).encode(history(mllm)), expected, unlike=unlike)


def test_every_picture_verdict_and_place_counts(mllm):
    base = mllm.encode(history(mllm))
    for other in (
        history(mllm, (1, 2, 6)),
        history(mllm, (2, 1, 3)),
        history(mllm, (6, 2, 3)),
        history(mllm, (1, 2, 3, 4), (5,)),
        history(mllm, liked_prompts=["a boat"]),
    ):
        change = difference(mllm.encode(other), base, dim=1)
        assert (change > FAR).all(), change


def test_the_preprocessor_file_of_the_folder_is_followed(folder, mllm):
    *_, preprocessor, side = FAMILIES[folder.name]
    assert mllm.family.image_size == side
    assert list(mllm.family.mean) == preprocessor.get("image_mean", list(type(mllm.family).mean))
    assert list(mllm.family.std) == preprocessor.get("image_std", list(type(mllm.family).std))


def test_an_answer_is_the_one_without_a_cache(mllm):
    """The cache and its positions give the words that reading everything anew for each of them gives."""
    read, words = history(mllm), []
    family, embed = mllm.family, mllm.model.get_input_embeddings()
    with torch.inference_mode():
        inputs = mllm._inputs(read, mllm.image_features(read.items), CLOSING_QUESTION)
        while len(words) < 6:
            last = family.text(**inputs, use_cache=False).last_hidden_state[:, -1]
            word = mllm.model.get_output_embeddings()(last).argmax(-1)
            if int(word) in mllm._end_tokens():
                break
            words.append(int(word))
            more = family.next_inputs(inputs, embed(word)[None])
            grown = {key: torch.cat([inputs[key], more[key]], -1 if key == "position_ids" else 1) for key in more}
            if "visual_pos_masks" in inputs:
                grown["visual_pos_masks"] = torch.nn.functional.pad(inputs["visual_pos_masks"], (0, 1))
            inputs = inputs | grown
    assert mllm.answer(read, limit=6) == mllm.tokenizer.decode(words, skip_special_tokens=True).strip()


def test_a_template_beside_the_tokenizer_is_found(folder, tmp_path):
    import json
    import shutil

    template = FAMILIES[folder.name][2]
    wrapped = json.dumps({"chat_template": template})
    for name, content in (("chat_template.jinja", template), ("chat_template.json", wrapped)):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        for file in copy.glob("chat_template*"):
            file.unlink()
        write_tokenizer(copy)
        (copy / name).write_text(content)
        assert PreferenceMLLM.load(copy).tokenizer.chat_template == template


@pytest.mark.parametrize("gone", ["tokenizer.json", "*token*"])
def test_a_folder_without_words_is_refused(folder, tmp_path, gone, one_sentence):
    """transformers 5 would make a tokenizer to which every text is the same."""
    import shutil

    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    for file in copy.glob(gone):
        file.unlink()
    with pytest.raises(MLLMError) as refused:
        PreferenceMLLM.load(copy)
    assert "has no tokenizer.json: put it there" in one_sentence(refused)


def test_a_family_that_the_installed_transformers_lacks_is_named(tmp_path, one_sentence):
    import json

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    if transformers_knows("qwen3_vl"):
        with pytest.raises(MLLMError, match="no weights"):
            PreferenceMLLM.load(tmp_path)
        return
    with pytest.raises(MLLMError, match="update transformers") as raised:
        PreferenceMLLM.load(tmp_path)
    assert "qwen3_vl" in one_sentence(raised)


def test_the_tiny_vocabulary_holds_every_sign():
    assert config_of("smolvlm").image_token_id == SPECIALS.index("<image>")
