"""ComfyUI with the pack in it on the pretend card: it paints what it paints on the CPU but for rounding, and what
crosses between host and card is counted. Run by tests/test_pretend_card.py in a process of its own."""

import contextlib

import comfy.sample
import pytest
import torch
from comfy import model_management as management
from comfy.model_patcher import ModelPatcher

from tests import pretend_card
from tests.prefgen import ip_adapter_files, tiny_mllms
from tests.prefgen.comfy import studio, tiny_flux
from tests.prefgen.comfy.test_model_calls import SIZE, close, coupled, half_mask, tiled, windowed
from tests.prefgen.comfy.tiny_models import clip_vision

pretend_card.insert()

CPU = torch.device("cpu")
CARD, OTHER = (torch.device("card", number) for number in range(2))
GIB = 2**30
FREE = 8 * GIB
STEPS = 4


@contextlib.contextmanager
def on_card(card=CARD, free=FREE):
    """ComfyUI as it sees a card of 8 GiB, of which so many bytes are free beside what is there."""
    before = {name: getattr(management, name) for name in REPLACED}
    total = management.get_free_memory

    def free_memory(device=None, torch_free_too=False):
        if device is not None and device.type == "cpu":
            return total(device, torch_free_too)
        left = free - pretend_card.memory((device or card).index or 0)
        return (left, left) if torch_free_too else left

    replacements = [lambda: card, free_memory, lambda *_, **__: FREE, yes, yes, no]
    try:
        for name, value in zip(REPLACED, [*replacements, management.CPUState.GPU, NORMAL], strict=True):
            setattr(management, name, value)
        yield
    finally:
        management.unload_all_models()
        for name, value in before.items():
            setattr(management, name, value)


REPLACED = (
    "get_torch_device",
    "get_free_memory",
    "get_total_memory",
    "should_use_fp16",
    "should_use_bf16",
    "supports_fp8_compute",
    "cpu_state",
    "vram_state",
)
NORMAL = management.VRAMState.NORMAL_VRAM


def yes(*args, **kwargs):
    return True


def no(*args, **kwargs):
    return False


def crossings(model, steps=STEPS, paint=studio.latents, **settings):
    """(what `paint` makes, host reads and uploads of each step but the first, bytes left on the card)."""
    before = pretend_card.memory()
    seen = []
    with pretend_card.Record() as record:
        painted = paint(model, steps=steps, callback=lambda *_: seen.append((record.reads, record.uploads)), **settings)
    spent = {tuple(b - a for a, b in zip(*pair, strict=True)) for pair in zip(seen, seen[1:], strict=False)}
    assert len(spent) == 1, f"every step is like every other: {record.where}"
    return painted, spent.pop(), pretend_card.memory() - before


SD15_WAYS = {
    "plain": ({}, 0),
    "both halves": ({"apply_to": "both"}, 0),
    "mask": ({"attn_mask": half_mask("left")}, 0),
    "masks by item": ({"attn_mask": torch.rand(2, 64, 128)}, 0),
    "items": ({"item_weights": "0=1, 1=0.3"}, 0),
    "an end": ({"end_at": 0.9}, 1),
    "schedule": ({"weight_schedule": "0=1, 1=0.3"}, 1),
    "items and a schedule": ({"item_weights": "0=1, 1=0.3", "weight_schedule": "0=1, 1=0.3"}, 1),
    "blocks": ({"block_weights": "in4=0.5"}, 0),
}
WAYS = {("SD15", name): way for name, way in SD15_WAYS.items()}
WAYS |= {("SDXL", name): SD15_WAYS[name] for name in ("both halves", "items and a schedule")}
LAYOUTS = {
    "tiles": lambda model: tiled(model, 2),
    "couple": lambda model: coupled(model, 3),
    "windows": lambda model: windowed(model, 2),
}


class Pair:
    """The same model for the CPU and for the card, with a user."""

    def __init__(self, pack, family):
        self.apply_user = pack("prefgen.comfy.patcher").apply_user
        self.model = studio.build(family)
        self.user = studio.users(pack, self.model, 1, family.lower())[0]
        self.on_card = ModelPatcher(self.model.model, CARD, CPU)


@pytest.fixture(scope="module")
def pairs(pack):
    return {family: Pair(pack, family) for family in ("SD15", "SDXL")}


@pytest.mark.parametrize("family, way", WAYS)
def test_every_way_to_apply_paints_the_cpu_s_picture_and_crosses_no_more_than_it_says(pairs, family, way):
    pair = pairs[family]
    options, reads = WAYS[family, way]
    settings = {"batch": 2, "size": SIZE}
    expected = studio.latents(pair.apply_user(pair.model, pair.user, **options), steps=STEPS, **settings)
    with on_card():
        plain, ours_not, _ = crossings(pair.on_card, **settings)
        painted, spent, left = crossings(pair.apply_user(pair.on_card, pair.user, **options), **settings)
    assert close(painted.cpu(), expected) and studio.far(painted.cpu(), plain.cpu())
    assert (spent[0] - ours_not[0], spent[1] - ours_not[1]) == (reads, 0)
    assert left == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_other_nodes_make_of_the_batch_is_asked_once(pairs, layout):
    pair = pairs["SD15"]
    settings = {"batch": 4 if layout == "windows" else 2, "size": SIZE}
    options = {} if layout == "tiles" else {"attn_mask": half_mask("left")}
    lay = LAYOUTS[layout]
    expected = studio.latents(pair.apply_user(lay(pair.model), pair.user, **options), steps=STEPS, **settings)
    with on_card():
        _, ours_not, _ = crossings(lay(pair.on_card), **settings)
        painted, spent, left = crossings(pair.apply_user(lay(pair.on_card), pair.user, **options), **settings)
    assert close(painted.cpu(), expected) and left == 0
    assert (spent[0] - ours_not[0], spent[1] - ours_not[1]) == (0, 0)


FLUX_WAYS = {"plain": ({}, 0), "mask": ({"attn_mask": half_mask("left")}, 0), "an end": ({"end_at": 0.9}, 1)}


@pytest.mark.parametrize(
    "kind, way", [("xlabs-v1", "plain"), ("instantx", "plain"), *(("xlabs-v1", way) for way in ("mask", "an end"))]
)
def test_a_flux_paints_the_cpu_s_picture_and_crosses_no_more_than_it_says(pack, kind, way, tmp_path):
    options, reads = FLUX_WAYS[way]
    apply_user, user = pack("prefgen.comfy.patcher").apply_user, tiny_flux.user_of(pack, tmp_path, kind)
    model = tiny_flux.build()
    there = ModelPatcher(model.model, CARD, CPU)
    expected = tiny_flux.latents(apply_user(model, user, **options), steps=STEPS)
    with on_card():
        plain, ours_not, _ = crossings(there, paint=tiny_flux.latents)
        painted, spent, left = crossings(apply_user(there, user, **options), paint=tiny_flux.latents)
    assert close(painted.cpu(), expected) and studio.far(painted.cpu(), plain.cpu())
    assert (spent[0] - ours_not[0], spent[1] - ours_not[1]) == (reads, 0)
    assert left == 0


def test_keys_and_values_of_all_blocks_go_up_in_one_copy_before_the_model_is_called(pack, pairs):
    pair = pairs["SD15"]
    with on_card():
        studio.latents(pair.on_card)
        uploads = []
        for model in (pair.on_card, pair.apply_user(pair.on_card, pair.user)):
            with pretend_card.Record() as record:
                studio.latents(model)
            uploads.append(record.uploads)
    assert uploads[1] - uploads[0] == 1


def test_a_schedule_is_read_from_a_copy_even_if_the_model_is_on_the_card(pairs):
    pair = pairs["SD15"]
    with on_card():
        studio.latents(pair.on_card)
        sampling = pair.on_card.model.model_sampling
        assert sampling.sigmas.device == CARD
        with pretend_card.Record() as record:
            pair.apply_user(pair.on_card, pair.user, weight_schedule="0=1, 1=0.3", start_at=0.123, end_at=0.9)
    assert record.reads <= len(list(sampling.buffers())), record.where


def test_an_interrupt_leaves_nothing_on_the_card(pairs):
    pair = pairs["SD15"]
    model = pair.apply_user(pair.on_card, pair.user, end_at=0.9)
    with on_card():
        studio.latents(pair.on_card)
        before = pretend_card.memory()

        def stop(step, *_):
            management.interrupt_current_processing()

        try:
            with pytest.raises(management.InterruptProcessingException):
                studio.latents(model, steps=STEPS, callback=stop)
        finally:
            management.interrupt_current_processing(False)
        assert pretend_card.memory() == before


def test_two_cards_paint_the_same_with_one_user(pairs):
    pair = pairs["SD15"]
    painted = []
    for card in (CARD, OTHER):
        with on_card(card):
            model = pair.apply_user(ModelPatcher(pair.model.model, card, CPU), pair.user, attn_mask=half_mask("left"))
            painted.append(studio.latents(model, size=SIZE).cpu())
            assert pretend_card.memory(1 - card.index) == 0
    assert torch.equal(*painted)


def test_an_ip_adapter_paints_the_same(pack, pairs, tmp_path):
    pair = pairs["SD15"]
    adapter = pack("prefgen.adapter_file").load_adapter(ip_adapter_files.write(tmp_path, "ip-adapter-plus_sd15"))
    pictures = [torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    history = pack("prefgen.history").PreferenceHistory.from_images(pictures[:1], pictures[1:])
    painted = []
    for place, model in ((contextlib.nullcontext(), pair.model), (on_card(), pair.on_card)):
        with place, torch.no_grad():
            _, vision = clip_vision("CLIP ViT-H", tmp_path)  # a new one, which has read nothing
            encoded = pack("prefgen.comfy.encoding").encode_history(history, None, vision)
            user = pack("prefgen.fusion").fuse_user(adapter, encoded)
            painted.append(studio.latents(pair.apply_user(model, user)).cpu())
    assert close(*painted)


def test_the_atelier_s_graph_paints_the_same(pack):
    files = pack("prefgen.atelier.models").WEIGHTS
    pictures = torch.rand(4, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    history = pack("prefgen.history").PreferenceHistory.from_images([pictures[:3]], [pictures[3:]])
    adapter = pack("prefgen.adapter_file").load_adapter(files / "adapter.safetensors")
    painted = []
    for place in (contextlib.nullcontext(), on_card()):
        with place, torch.no_grad():
            model, clip, vae, vision = pack("nodes").LoadAtelier.execute().result
            mllm = pack("prefgen.comfy.memory").load_mllm(files / "mllm", "fp32", "auto")
            user = pack("prefgen.fusion").fuse_user(
                adapter, pack("prefgen.comfy.encoding").encode_history(history, mllm, vision)
            )
            patched = pack("prefgen.comfy.patcher").apply_user(model, user)
            conds = [[encoded(clip, text)] for text in ("a boat", "")]
            noise = torch.randn(1, vae.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
            settings = {"disable_pbar": True, "seed": 0}
            latents = comfy.sample.sample(
                patched, noise, 2, 4.0, "euler", "normal", *conds, torch.zeros_like(noise), **settings
            )
            painted.append(vae.decode(latents).cpu())
    assert close(*painted) and pretend_card.memory() == 0


def encoded(clip, text):
    states, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return [states, {"pooled_output": pooled}]


@pytest.mark.parametrize("family", tiny_mllms.FAMILIES)
def test_every_mllm_reads_the_same_and_one_too_large_for_the_card_is_put_there_whole_or_named(
    pack, family, tmp_path, one_sentence
):
    folder = tiny_mllms.write_folder(tmp_path / family, family)
    pictures = [torch.rand(1, 24, 24, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    history = pack("prefgen.history").PreferenceHistory.from_images(pictures[:1], pictures[1:])
    encode, memory = pack("prefgen.comfy.encoding").encode_history, pack("prefgen.comfy.memory")
    expected = encode(history, memory.load_mllm(folder, "fp32", "cpu")).hidden
    # ComfyUI keeps 1.2 GiB free and would leave the rest of a model in main memory: all of it is put on the card.
    for free in (FREE, GIB):
        with on_card(free=free):
            hidden = encode(history, memory.load_mllm(folder, "fp32", "auto")).hidden
            assert close(hidden.cpu(), expected) and pretend_card.memory() == 0
