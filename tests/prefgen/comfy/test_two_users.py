"""Two users, a mask for each half of the canvas: each half leans to its own user, and the judge says so."""

import itertools

import comfy.sample
import pytest
import torch

pytestmark = pytest.mark.slow

PAIRS = 6


@pytest.fixture(scope="module")
def painted(pack):
    """(left user, right user, left half mirrored to a whole picture, right half likewise) for pairs of test users."""
    world, history = pack("prefgen.atelier.users"), pack("prefgen.history")
    encoding, memory = pack("prefgen.comfy.encoding"), pack("prefgen.comfy.memory")
    models, captions = pack("prefgen.atelier.models"), pack("prefgen.atelier.captions")
    histories, patcher = pack("prefgen.comfy.histories"), pack("prefgen.comfy.patcher")
    fusion = pack("prefgen.fusion")
    adapter = pack("prefgen.adapter_file").load_adapter(models.WEIGHTS / "adapter.safetensors")
    model, clip, vae, clip_vision = pack("prefgen.comfy.atelier_models").load_atelier()
    mllm = memory.load_mllm(models.MLLM_FOLDER, "auto", "cpu")

    def fused(person):
        pictures = history.PreferenceHistory.from_images(*histories.load(person.id)[:2])
        read = encoding.encode_history(pictures, mllm, clip_vision)
        return fusion.FusedUser(fusion.fuse_user_vector(adapter, read), adapter)

    def states(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    # Users whose palettes differ: a palette can be judged on half a picture.
    people = {}
    for number in itertools.count():
        person = world.user(number)
        palette = dict(person.tastes[0].liked).get("palette")
        if world.split(number) == "test" and len(person.tastes) == 1 and palette:
            people.setdefault(palette, person)
        if len(people) == 4:
            break
    left = torch.zeros(1, 128, 128)
    left[:, :, :64] = 1
    results = []
    for i, (one, two) in enumerate(list(itertools.permutations(people.values(), 2))[: 2 * PAIRS : 2]):
        patched = patcher.apply_user(model, fused(one), attn_mask=left)
        patched = patcher.apply_user(patched, fused(two), attn_mask=1 - left)
        prompt = captions.neutral(*captions.heldout_prompts()[i])
        noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(i))
        latent = comfy.sample.sample(
            patched, noise, 20, 3.0, "euler", "sgm_uniform", states(prompt), states(""), torch.zeros(1, 8, 16, 16),
            disable_pbar=True, seed=i,
        )  # fmt: skip
        picture = vae.decode(latent)[0]
        halves = [torch.cat([half, half.flip(1)], 1) for half in (picture[:, :64], picture[:, 64:].flip(1))]
        results.append((one, two, *halves))
    return results


def test_each_half_has_its_own_users_palette_more_often_than_the_others(painted, pack):
    judge = pack("prefgen.atelier.judge").load_judge()
    own = other = 0
    for one, two, left, right in painted:
        palettes = [dict(person.tastes[0].liked)["palette"] for person in (one, two)]
        read = [reading["attributes"]["palette"] for reading in judge.read(torch.stack([left, right]))]
        own += (read[0] == palettes[0]) + (read[1] == palettes[1])
        other += (read[0] == palettes[1]) + (read[1] == palettes[0])
    assert own >= other + PAIRS // 2, f"of {2 * PAIRS} halves {own} have their own user's palette, {other} the other's"
