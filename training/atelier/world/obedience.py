"""Whether the UNet draws what it is asked for: held-out prompts with traits in words or as trait tokens, read by a
judge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from prefgen.atelier.models import clip_tokenizer, load_clip, load_unet_diffusers, load_vae_diffusers
from prefgen.atelier.world.judge import Reading, load_judge
from prefgen.atelier.world.labels import CLASSES, class_labels, value_labels, visible_traits
from prefgen.atelier.world.prompts import Prompt, phrases, random_prompt
from prefgen.atelier.world.scenes import Scene, random_scene
from prefgen.atelier.world.traits import CONTINUOUS, NAMED

from ...common.atelier_clip import text_features, tokenize
from ...common.sampling import decode, sample
from ...data.trait_tokens import TraitLabels, load_trait_tokens

GUIDANCE = 3.0
STEPS = 20
# Named traits that a request asks for.
ASKED = 5


@dataclass(frozen=True)
class Request:
    """What a picture is asked to show: a closed held-out prompt, and a scene of it whose look is asked for in part."""

    prompt: Prompt
    scene: Scene
    traits: tuple[str, ...]

    @property
    def text(self) -> str:
        """The prompt with the asked traits in words."""
        look = phrases(self.scene)
        return ", ".join([self.prompt.text, *(look[trait] for trait in self.traits)])


def heldout_requests(count: int, seed: int = 5) -> list[Request]:
    """Closed prompts of the tests, each with ASKED named traits."""
    return closed_requests(count, seed, heldout=True)


def closed_requests(count: int, seed: int, heldout: bool | None) -> list[Request]:
    """Closed prompts, each with ASKED named traits. heldout: of the tests, of training, or (None) any."""
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    while len(requests) < count:
        prompt = random_prompt(rng, heldout)
        if not (prompt.subject and prompt.setting and prompt.companion):
            continue
        content = {"subject": prompt.subject, "number": prompt.number, "setting": prompt.setting}
        scene = random_scene(rng).with_traits(companion=prompt.companion, **content)
        traits = rng.choice(list(NAMED), ASKED, replace=False)
        requests.append(Request(prompt, scene, tuple(traits.tolist())))
    return requests


@torch.inference_mode()
def draw(texts: list[str], scenes: list[Scene] | None = None, batch: int = 16) -> torch.Tensor:
    """Pictures [B, 3, 256, 256] in -1..1 by the exported weights. scenes: what the trait tokens say whole, if any."""
    clip = load_clip()
    tokenizer = clip_tokenizer()
    unet = load_unet_diffusers()
    vae = load_vae_diffusers()
    empty = text_features(clip, tokenize(tokenizer, [""]))[0]
    pictures = []
    for start in range(0, len(texts), batch):
        states = text_features(clip, tokenize(tokenizer, texts[start : start + batch]))[0]
        unconditional = empty.expand_as(states)
        if scenes:
            tokens = trait_tokens_of(scenes[start : start + batch])
            states = torch.cat([states, tokens], 1)
            # Both halves are one batch: the empty prompt's tokens say nothing.
            unconditional = torch.cat([unconditional, trait_tokens_of(scenes[start : start + batch], False)], 1)
        with torch.autocast("cpu", torch.bfloat16):
            latents = sample(unet, states, unconditional, GUIDANCE, STEPS, seed=start)
        pictures.append(decode(vae, latents))
    return torch.cat(pictures)


def trait_tokens_of(scenes: list[Scene], say: bool = True) -> torch.Tensor:
    """The exported trait tokens [B, 2, 128] of all that can be seen in scenes, or of nothing."""
    seen = torch.tensor([[say] * len(CLASSES) + [say and s for s in visible_traits(scene)] for scene in scenes])
    classes = torch.tensor([class_labels(scene) for scene in scenes])
    values = torch.tensor([value_labels(scene) for scene in scenes])
    return load_trait_tokens().of(TraitLabels(classes, values, seen))


def measure(requests: list[Request]) -> tuple[dict, torch.Tensor]:
    """(how often what is asked for is there, pictures [n, 3, 256, 256]): traits in words, then as trait tokens."""
    judge = load_judge("a")
    pictures = draw([request.text for request in requests])
    by_tokens = draw([request.prompt.text for request in requests], [request.scene for request in requests])
    figures = shown(judge.read(pictures), requests)
    figures["trait tokens"] = shown_scenes(judge.read(by_tokens), [request.scene for request in requests])
    return figures, torch.cat([pictures[:16], by_tokens[:16]])


def shown(readings: list[Reading], requests: list[Request]) -> dict[str, float]:
    """Share of pictures that show the prompt's subject, number, setting and companion, and each asked trait."""
    hits: dict[str, list[bool]] = {}
    for reading, request in zip(readings, requests, strict=True):
        for name in ("subject", "number", "setting", "companion"):
            hits.setdefault(name, []).append(getattr(reading.scene, name) == getattr(request.scene, name))
        for trait in request.traits:
            hits.setdefault(trait, []).append(reading.scene.kinds[trait] == request.scene.kinds[trait])
    return {name: round(float(np.mean(row)), 3) for name, row in hits.items()}


def shown_scenes(readings: list[Reading], scenes: list[Scene]) -> dict[str, float]:
    """Share of named traits, and 1 - |d| / E|d| of the continuous ones, mean over those that the scene shows."""
    named = [
        reading.scene.kinds[trait] == kind
        for reading, scene in zip(readings, scenes, strict=True)
        for trait, kind in scene.kinds.items()
    ]
    scores = []
    for reading, scene in zip(readings, scenes, strict=True):
        for (name, trait), visible in zip(CONTINUOUS.items(), visible_traits(scene), strict=True):
            if visible:
                distance = trait.distance(reading.scene.numbers[name], scene.numbers[name])
                scores.append(1 - distance / trait.mean_distance(scene.numbers[name]))
    return {"named": round(float(np.mean(named)), 3), "continuous": round(float(np.mean(scores)), 3)}
