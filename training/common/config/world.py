"""The sections of the stages that make the second world's base models (`training/atelier/world`)."""

from __future__ import annotations

from typing import Literal

from .sections import Count, Natural, Rate, Section, Share, StageSection, Training, Weight


class FromNothing(Training):
    """What the stages have that train a network from nothing."""

    optimiser: Literal["muon", "adamw"] = "muon"


class WorldPool(StageSection):
    """Draw the pictures that the other stages learn from."""

    stage = "atelier.world.pool"

    count: Count = 50000
    # The first pictures are stored at 256 px as well: the VAE's crops are cut from them.
    large: Count = 10000
    # How many draw at once.
    processes: Count = 2
    seed: Natural = 0


class WorldVae(FromNothing):
    """The VAE: 256 px, 8x, 8 channels."""

    stage = "atelier.world.vae"

    steps: Natural = 9000
    # Of 64 px crops; a quarter of it of 128 px ones.
    batch: Count = 16
    lr: Rate = 8e-3
    # Weight of the KL divergence from a standard normal distribution.
    kl: Weight = 1e-4
    # Most noise in the latents that are decoded, in their own deviations.
    noise: Weight = 0.25
    # Weight of scale equivariance: averaged latents are decoded to the averaged picture.
    equivariance: Weight = 1.0
    # Pictures that it is measured on.
    heldout: Count = 500
    seed: Natural = 1


class WorldVaeDecoder(FromNothing):
    """The VAE's decoder, against a discriminator."""

    stage = "atelier.world.vae_decoder"

    steps: Natural = 3000
    # Of 128 px crops.
    batch: Count = 4
    lr: Rate = 1e-3
    # Weight of the adversarial loss, and the discriminator's rate.
    adversarial: Weight = 0.1
    adversary_lr: Rate = 4e-4
    # Most noise in the latents that are decoded, in their own deviations.
    noise: Weight = 0.25
    # Pictures that it is measured on.
    heldout: Count = 500
    seed: Natural = 11


class WorldJudge(FromNothing):
    """The judge that choices are made by."""

    stage = "atelier.world.judge_a"

    steps: Natural = 5000
    batch: Count = 64
    lr: Rate = 6e-3
    # Channels of its first layer.
    width: Count = 32
    # Fresh renders that its errors are measured on, and as many that its intervals are calibrated on.
    heldout: Count = 4000
    seed: Natural = 2


class WorldSecondJudge(WorldJudge):
    """The judge that is reported, of other width, augmentation and seed."""

    stage = "atelier.world.judge_b"

    width: Count = 40
    seed: Natural = 102


class WorldClip(FromNothing):
    """The CLIP pair."""

    stage = "atelier.world.clip"

    steps: Natural = 4000
    batch: Count = 96
    lr: Rate = 5e-3
    # Weight of the heads that read traits, beside the contrastive loss.
    heads: Weight = 1.0
    seed: Natural = 3


class WorldClipVision(WorldClip):
    """CLIP's image tower, for longer."""

    stage = "atelier.world.clip_vision"

    # The heads' sum, where CLIP has about their mean.
    heads: Weight = 4.0
    seed: Natural = 13


class WorldUnet(FromNothing):
    """The text-conditioned UNet."""

    stage = "atelier.world.unet"

    steps: Natural = 6000
    batch: Count = 64
    lr: Rate = 4e-3
    # So many pictures of the pool, its first ones, are encoded and learnt from.
    latents: Count = 30000
    # Share of samples without a text, for guidance.
    empty: Share = 0.1
    # One batch in so many has trait tokens behind its text, one in so many only the last 30 % of the noise.
    trait_batches: Count = 3
    fine_batches: Count = 4
    # Decay of the weights' moving average, which is what is exported.
    ema: Rate = 0.999
    # Held-out prompts that it is measured on, and after how many steps.
    pictures: Count = 160
    measure_every: Count = 2500
    seed: Natural = 4


class WorldMllmVision(FromNothing):
    """Vision tower and connector of the MLLM."""

    stage = "atelier.world.mllm_vision"

    steps: Natural = 2000
    batch: Count = 96
    lr: Rate = 4e-3
    seed: Natural = 7


class WorldCaptioning(FromNothing):
    """The MLLM's language model, before it reads histories: it captions single pictures."""

    stage = "atelier.world.captioning"

    steps: Natural = 2000
    batch: Count = 64
    lr: Rate = 3e-3
    seed: Natural = 6


class World(Section):
    """The second world's stages."""

    pool: WorldPool = WorldPool()
    vae: WorldVae = WorldVae()
    vae_decoder: WorldVaeDecoder = WorldVaeDecoder()
    judge_a: WorldJudge = WorldJudge()
    judge_b: WorldSecondJudge = WorldSecondJudge()
    clip: WorldClip = WorldClip()
    clip_vision: WorldClipVision = WorldClipVision()
    unet: WorldUnet = WorldUnet()
    mllm_vision: WorldMllmVision = WorldMllmVision()
    captioning: WorldCaptioning = WorldCaptioning()
