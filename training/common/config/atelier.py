"""The sections of the stages that make the atelier's base models; real bases come trained."""

from __future__ import annotations

from .sections import Count, Natural, Rate, Section, Share, StageSection, Training, Weight
from .world import World


class Pool(StageSection):
    """Draw the pictures that the atelier's other stages learn from."""

    stage = "atelier.pool"

    count: Count = 40000
    # How many draw at once.
    processes: Count = 2
    seed: Natural = 0


class Vae(Training):
    """The atelier's VAE."""

    stage = "atelier.vae"

    steps: Natural = 5500
    # Of crops; a quarter of it of full pictures.
    batch: Count = 16
    lr: Rate = 1.5e-3
    # Weight of the KL divergence from a standard normal distribution.
    kl: Weight = 1e-4
    seed: Natural = 1


class Judge(Training):
    """The judge, which reads the atelier's attributes off a picture."""

    stage = "atelier.judge"

    steps: Natural = 4000
    batch: Count = 64
    lr: Rate = 2.5e-3
    # Fresh renders that its accuracy is measured on.
    heldout: Count = 2000
    seed: Natural = 2


class Clip(Training):
    """The atelier's CLIP."""

    stage = "atelier.clip"

    steps: Natural = 1600
    batch: Count = 96
    lr: Rate = 1e-3
    # Weight of the heads that name the attributes, beside the contrastive loss.
    heads: Weight = 1.0
    seed: Natural = 3


class Unet(Training):
    """The atelier's text-conditioned UNet."""

    stage = "atelier.unet"

    steps: Natural = 4600
    batch: Count = 64
    lr: Rate = 1e-3
    # Share of samples without a text, for guidance, and of captions without attributes.
    empty: Share = 0.1
    neutral: Share = 0.15
    # Decay of the weights' moving average, which is what is exported.
    ema: Rate = 0.9985
    # Held-out prompts that it is measured on.
    pictures: Count = 160
    seed: Natural = 4


class MllmVision(Training):
    """Vision tower and connector of the atelier's MLLM."""

    stage = "atelier.mllm_vision"

    steps: Natural = 2000
    batch: Count = 96
    lr: Rate = 1e-3
    seed: Natural = 7


class Atelier(Section):
    """The stages that make the atelier's base models; real bases come trained."""

    pool: Pool = Pool()
    vae: Vae = Vae()
    judge: Judge = Judge()
    clip: Clip = Clip()
    unet: Unet = Unet()
    mllm_vision: MllmVision = MllmVision()
    world: World = World()
