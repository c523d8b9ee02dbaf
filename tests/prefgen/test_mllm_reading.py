"""How a folder says that pictures and conversations are read: which of its files counts is what transformers says, and
the fingerprint tells when it changes."""

import json
import shutil

import pytest
import torch
import transformers

from prefgen.adapter_checks import check_encoded
from prefgen.compat import transformers_knows
from prefgen.encoded import EncodedPreference
from prefgen.errors import AdapterError
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import MLLMError, PreferenceMLLM
from tests.prefgen.tiny_mllms import FAMILIES, IDEFICS_TEMPLATE, QWEN_TEMPLATE, write_folder, write_tokenizer

# Templates of language models, which know a message's content as a string alone.
TEXT_ALONE = {
    "adds strings": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}",
    "prints what it gets": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "passes lists over": "{% for m in messages if m.content is string %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "leaves pictures out": (
        "{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ c.text }} {% endfor %}{% endfor %}"
    ),
    "leaves words out": (
        "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image>{% endfor %}{% endfor %}"
    ),
    "refuses": "{{ raise_exception('Only user and assistant roles with text are supported!') }}",
    "is no template": "{% for m in messages %}{{ m.role }",
}
FROM_FIVE = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="versions before 5 have other orders, each its own"
)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A folder of each family that the installed transformers has."""
    if not transformers_knows(FAMILIES[request.param][0]):
        pytest.skip("the installed transformers doesn't have this family")
    return write_folder(tmp_path_factory.mktemp("mllm") / request.param, request.param)


@pytest.fixture(scope="module")
def idefics2(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllm") / "Idefics2", "Idefics2")


def copy_of(folder, place):
    """A copy with neither template nor image processor; the tokenizer is written anew."""
    shutil.copytree(folder, place)
    for file in [*place.glob("chat_template*"), *place.glob("*processor_config.json")]:
        file.unlink()
    write_tokenizer(place)
    return place


def history(size):
    draw = torch.rand(3, size, size, 3, generator=torch.Generator().manual_seed(0))
    return PreferenceHistory.from_images(list(draw[:2]), [draw[2]], ["a boat"])


def put(folder, name, template):
    """A template under one of the names that transformers looks for."""
    if name == "tokenizer_config.json":
        file = folder / name
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"chat_template": template}))
    elif name.endswith(".json"):
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(content | {"chat_template": template}))
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(template)


def image_processor(folder):
    """transformers' own."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder)
    except ValueError as error:
        if "Unrecognized image processor" not in str(error):
            raise
        pytest.skip("this transformers has an image processor of this family only by its processor")


def marked(number):
    return IDEFICS_TEMPLATE.replace("<|im_start|>", "<|im_start|>" * number)


SOURCES = [
    "tokenizer_config.json",
    "additional_chat_templates/default.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
]


class TestTheImageProcessor:
    def saved(self, folder, tmp_path):
        """The folder as transformers 4 saves it, and as transformers 5 does, and transformers' own image processor."""
        settings = FAMILIES[folder.name][3] | {"image_std": [0.31, 0.32, 0.33]}
        old, new = copy_of(folder, tmp_path / "old"), copy_of(folder, tmp_path / "new")
        (old / "preprocessor_config.json").write_text(json.dumps(settings))
        nested = {"image_processor": settings, "video_processor": {"image_mean": [0.9] * 3}}
        (new / "processor_config.json").write_text(json.dumps(nested))
        for place in (old, new):
            put(place, "chat_template.jinja", FAMILIES[folder.name][2])
        return image_processor(old), old, new

    def test_it_is_the_one_that_transformers_reads_in_either_layout(self, folder, tmp_path):
        processor, old, new = self.saved(folder, tmp_path)
        ours = [PreferenceMLLM.load(place) for place in (old, new)]
        for mllm in ours:
            assert list(mllm.family.mean) == list(processor.image_mean)
            assert list(mllm.family.std) == list(processor.image_std) == [0.31, 0.32, 0.33]
            assert mllm.family.image_size == FAMILIES[folder.name][4]
        read = history(ours[0].family.image_size)
        assert torch.equal(*(mllm.encode(read) for mllm in ours))
        assert ours[0].fingerprint["reading"] == ours[1].fingerprint["reading"]

    @FROM_FIVE
    def test_a_folder_that_transformers_itself_has_saved(self, folder, tmp_path):
        """AutoProcessor reads the old layout and writes its own."""
        _, old, _ = self.saved(folder, tmp_path)
        try:
            processor = transformers.AutoProcessor.from_pretrained(old)
        except ImportError as error:
            pytest.skip(str(error))
        new = copy_of(folder, tmp_path / "its own")
        for file in new.glob("tokenizer*"):
            file.unlink()
        processor.save_pretrained(new)
        assert not (new / "preprocessor_config.json").exists()
        ours = [PreferenceMLLM.load(place) for place in (old, new)]
        read = history(ours[0].family.image_size)
        assert torch.equal(*(mllm.encode(read) for mllm in ours))
        assert ours[0].fingerprint["reading"] == ours[1].fingerprint["reading"]

    @FROM_FIVE
    def test_of_both_files_the_nested_one_counts_as_in_transformers(self, folder, tmp_path):
        _, _, new = self.saved(folder, tmp_path)
        other = json.loads((new / "processor_config.json").read_text())["image_processor"] | {"image_mean": [0.2] * 3}
        (new / "preprocessor_config.json").write_text(json.dumps(other))
        theirs = transformers.AutoImageProcessor.from_pretrained(new)
        assert list(PreferenceMLLM.load(new).family.mean) == list(theirs.image_mean) != [0.2] * 3

    def test_where_it_is_silent_it_means_what_transformers_means(self, folder, tmp_path):
        place = copy_of(folder, tmp_path / "silent")
        (place / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
        put(place, "chat_template.jinja", FAMILIES[folder.name][2])
        theirs = image_processor(place)
        family = PreferenceMLLM.load(place).family
        assert list(family.mean) == list(theirs.image_mean) and list(family.std) == list(theirs.image_std)

    @pytest.mark.parametrize(
        "settings",
        [
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [0.5, 0.6, 0.7]},
            {"do_rescale": False, "image_mean": [100.0, 110.0, 120.0], "image_std": [50.0, 60.0, 70.0]},
            {"do_normalize": False},
            {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.3, 0.2]},
        ],
    )
    def test_pixels_are_those_of_transformers_however_they_are_scaled(self, idefics2, tmp_path, settings):
        place = copy_of(idefics2, tmp_path / "scaled")
        sizes = FAMILIES["Idefics2"][3]["size"]
        (place / "preprocessor_config.json").write_text(json.dumps(settings | {"size": sizes}))
        processor = transformers.AutoImageProcessor.from_pretrained(place)
        picture = (torch.rand(12, 12, 3, generator=torch.Generator().manual_seed(1)) * 255).byte()
        theirs = torch.as_tensor(
            processor(picture.numpy(), do_resize=False, do_image_splitting=False, return_tensors="pt")["pixel_values"]
        )
        ours = PreferenceMLLM.load(place).preprocess(picture.float() / 255)
        assert (ours - theirs.reshape(3, 12, 12)).abs().max() < 1e-5 * theirs.abs().max()

    @pytest.mark.parametrize(
        "damage",
        [
            "[]",
            "{",
            '{"image_mean": "grey"}',
            '{"image_mean": [0.5, "grey", 0.5]}',
            '{"image_std": [0.5, NaN, 0.5]}',
            '{"size": {"longest_edge": "x"}}',
        ],
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_damaged_one_is_named(self, idefics2, tmp_path, one_sentence, damage, nested):
        place = copy_of(idefics2, tmp_path / "taste")
        name = "processor_config.json" if nested else "preprocessor_config.json"
        (place / name).write_text(f'{{"image_processor": {damage}}}' if nested else damage)
        with pytest.raises(MLLMError, match=name) as raised:
            PreferenceMLLM.load(place)
        one_sentence(raised)


class TestTheChatTemplate:
    @FROM_FIVE
    @pytest.mark.parametrize("first", range(len(SOURCES)))
    @pytest.mark.parametrize("second", range(len(SOURCES)))
    def test_of_two_the_one_counts_that_transformers_processor_has(self, idefics2, tmp_path, first, second):
        place = copy_of(idefics2, tmp_path / "two")
        (place / "preprocessor_config.json").write_text("{}")
        for number in {first, second}:
            put(place, SOURCES[number], marked(number + 1))
        try:
            theirs = transformers.AutoProcessor.from_pretrained(place).chat_template
        except ValueError as error:
            assert "conflicting files" in str(error)
            with pytest.raises(MLLMError, match="refuses together"):
                PreferenceMLLM.load(place)
            return
        # Its processor has none of its own then, and conversations are written by the tokenizer's.
        expected = marked(1) if theirs is None else theirs
        assert PreferenceMLLM.load(place).tokenizer.chat_template == expected

    @pytest.mark.parametrize("kind", TEXT_ALONE)
    @pytest.mark.parametrize("right", ["chat_template.json", "chat_template.jinja", "processor_config.json"])
    def test_one_for_text_alone_in_the_tokenizer_gives_way_to_the_right_one(self, idefics2, tmp_path, kind, right):
        place, plain = copy_of(idefics2, tmp_path / "both"), copy_of(idefics2, tmp_path / "plain")
        put(plain, "tokenizer_config.json", IDEFICS_TEMPLATE)
        put(place, "tokenizer_config.json", TEXT_ALONE[kind])
        put(place, right, IDEFICS_TEMPLATE)
        ours, theirs = PreferenceMLLM.load(place), PreferenceMLLM.load(plain)
        assert torch.equal(ours.encode(history(12)), theirs.encode(history(12)))
        assert ours.fingerprint == theirs.fingerprint | {"name": "both"}

    @pytest.mark.parametrize("kind", TEXT_ALONE)
    def test_one_for_text_alone_is_refused(self, folder, tmp_path, one_sentence, kind):
        if folder.name == "LLaVA-OneVision" and kind == "leaves pictures out":
            pytest.skip("its pictures stand in the text, so nothing is left out")
        place = copy_of(folder, tmp_path / "taste")
        put(place, "tokenizer_config.json", TEXT_ALONE[kind])
        with pytest.raises(MLLMError, match="can't write a conversation with pictures") as raised:
            PreferenceMLLM.load(place)
        assert "taste" in one_sentence(raised)

    @pytest.mark.parametrize("source", SOURCES)
    def test_one_for_text_alone_is_refused_wherever_it_stands(self, idefics2, tmp_path, source):
        place = copy_of(idefics2, tmp_path / "taste")
        put(place, source, TEXT_ALONE["prints what it gets"])
        with pytest.raises(MLLMError, match="can't write a conversation with pictures"):
            PreferenceMLLM.load(place)

    @pytest.mark.parametrize("source", ["tokenizer_config.json", "processor_config.json"])
    def test_of_several_by_name_it_is_the_default(self, idefics2, tmp_path, one_sentence, source):
        named = {"tool_use": TEXT_ALONE["adds strings"], "default": IDEFICS_TEMPLATE}
        several = [{"name": name, "template": template} for name, template in named.items()]
        place = copy_of(idefics2, tmp_path / "several")
        put(place, source, several if source == "tokenizer_config.json" else named)
        assert PreferenceMLLM.load(place).tokenizer.chat_template == IDEFICS_TEMPLATE
        put(place, source, several[:1] if source == "tokenizer_config.json" else {"rag": IDEFICS_TEMPLATE})
        with pytest.raises(MLLMError, match="none named 'default'") as raised:
            PreferenceMLLM.load(place)
        one_sentence(raised)

    @pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[]", b'{"chat_template": 3}', b"{}"])
    def test_a_damaged_file_is_named(self, idefics2, tmp_path, one_sentence, content):
        place = copy_of(idefics2, tmp_path / "taste")
        (place / "chat_template.json").write_bytes(content)
        with pytest.raises(MLLMError, match=r"chat_template\.json") as raised:
            PreferenceMLLM.load(place)
        one_sentence(raised)

    def test_a_family_whose_template_tears_pictures_and_words_apart_is_read_in_order(self, folder):
        mllm = PreferenceMLLM.load(folder)
        text = mllm.conversation([(True, "a boat"), (False, "")], "avoid ?")
        parts = [text.index(part) for part in (mllm.image_token, "liked (a boat)", "disliked", "avoid ?")]
        assert parts == sorted(parts) and text.count(mllm.image_token) == 2


class TestTheFingerprint:
    @pytest.fixture
    def place(self, idefics2, tmp_path):
        place = copy_of(idefics2, tmp_path / "taste")
        put(place, "chat_template.jinja", IDEFICS_TEMPLATE)
        return place

    def fingerprint_of(self, place):
        return PreferenceMLLM.load(place).fingerprint

    def test_it_tells_a_changed_template_image_processor_and_tokenizer(self, place):
        before = self.fingerprint_of(place)
        assert len(before["reading"]) == 64
        put(place, "chat_template.jinja", marked(2))
        template = self.fingerprint_of(place)
        (place / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
        mean = self.fingerprint_of(place)
        (place / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 8, "shortest_edge": 4}}))
        size = self.fingerprint_of(place)
        text = (place / "tokenizer.json").read_text().replace('"liked"', '"loved"')
        (place / "tokenizer.json").write_text(text)
        tokenizer = self.fingerprint_of(place)
        assert len({each["reading"] for each in (before, template, mean, size, tokenizer)}) == 5
        for each in (template, mean, size, tokenizer):
            assert each | {"reading": before["reading"]} == before  # the weights are the same

    def test_an_adapter_refuses_what_reads_another_way_and_takes_what_it_does_not_know(
        self, place, new_adapter, one_sentence
    ):
        fingerprint = self.fingerprint_of(place)
        header = new_adapter(mllm=fingerprint | {"sem_layers": [0, 1], "core_layer": 1}).header
        states = torch.zeros(fingerprint["num_layers"], fingerprint["hidden_size"])
        check_encoded(header, EncodedPreference(states, None, None, mllm=fingerprint))
        put(place, "chat_template.jinja", QWEN_TEMPLATE.replace("<|image_pad|>", "<image>"))
        other = self.fingerprint_of(place)
        with pytest.raises(AdapterError, match="another chat template, tokenizer or image processor") as raised:
            check_encoded(header, EncodedPreference(states, None, None, mllm=other))
        one_sentence(raised)
        before = {
            key: value for key, value in fingerprint.items() if key != "reading"
        }  # an adapter of before it was told
        for recorded, used in ((before, other), (fingerprint, before)):
            header = new_adapter(mllm=recorded | {"sem_layers": [0, 1], "core_layer": 1}).header
            check_encoded(header, EncodedPreference(states, None, None, mllm=used))
