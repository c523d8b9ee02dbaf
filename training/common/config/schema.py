"""What a configuration may say. Unknown keys are refused, so a typing error never trains for a week.

One file describes a whole pipeline: the data, the base model, the MLLM, and a section for every stage, named like it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PARTS = ("semantic", "core", "image")
Part = Literal["semantic", "core", "image"]
Precision = Literal["fp32", "bf16", "fp16"]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Part of a configuration: no unknown keys, no change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Whose taste is learnt. path: a folder of the common schema (training/data/schema.py), none for the atelier's
    simulated users. questions: what `training.data.vqa` made of that folder."""

    path: Path | None = None
    questions: Path | None = None


class Base(Section):
    """The frozen diffusion model. path: a diffusers folder, none for the atelier's own. pixels: side of the training
    pictures. ip_adapter: a public IP-Adapter file whose K and V the branch starts from, the UNet's own without one.
    gradient_checkpointing: compute the UNet's activations twice rather than keep them."""

    family: Literal["atelier", "sd15", "sdxl"] = "atelier"
    path: Path | None = None
    pixels: Count = 128
    precision: Precision = "bf16"
    ip_adapter: Path | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _whole(self):
        if self.family != "atelier" and self.pixels % 64:
            raise ValueError(f"pixels is {self.pixels}: {self.family} needs a multiple of 64")
        return self


class Lora(Section):
    """Low-rank weights beside the language model's own; vision tower and connector stay as they are.
    targets: the linear layers of every decoder layer, by their last name."""

    rank: Count = 8
    alpha: Annotated[float, Field(gt=0)] = 8
    dropout: Share = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Mllm(Section):
    """The multimodal language model. path: a transformers folder, none for the atelier's own, which is trained whole.
    lora: what is trained of another; none takes it as it is. nf4: 4-bit weights under the LoRA, needs bitsandbytes."""

    path: Path | None = None
    precision: Precision = "bf16"
    nf4: bool = False
    lora: Lora | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _whole(self):
        if self.nf4 and self.lora is None:
            raise ValueError("nf4 weights can't be trained: give mllm.lora")
        if self.lora and self.path is None:
            raise ValueError("the atelier's MLLM is trained whole: mllm.lora needs mllm.path")
        return self


class ClipVision(Section):
    """The image encoder of e_img. path: a transformers CLIP vision folder, none for the atelier's own."""

    path: Path | None = None


class StageSection(Section):
    """What a stage of its own is set by, a seed in every one. stage: its name on the command line. reads: the sections
    besides its own that its result depends on."""

    stage: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()


class Training(StageSection):
    """What every trained stage has. batch: of all processes together; accumulate: into how many pieces each process
    cuts its share of it."""

    steps: Natural
    batch: Count
    accumulate: Count = 1
    lr: Rate
    seed: Natural


class TrainMllm(Training):
    """users: how many training users are read (0: all). pictures: the most liked and the most disliked ones in a
    history. others: share of a batch that asks other questions than the closing one (of a data set: data.vqa's).
    Weights of the losses: identity, InfoNCE between two histories of one user; contrast, a liked picture against a
    disliked one; reading, heads that name the attributes."""

    stage = "train_mllm"
    reads = ("data", "mllm")

    steps: Natural = 1600
    batch: Annotated[int, Field(ge=4)] = 32
    lr: Rate = 1e-3
    warmup: Natural = 200
    weight_decay: Weight = 0.01
    users: Natural = 20000
    pictures: Count = 8
    others: Share = 0.125
    identity: Weight = 0.3
    contrast: Weight = 0.0
    reading: Weight = 4.0
    seed: Natural = 8

    @property
    def groups(self) -> tuple[int, int, int]:
        """How many users (two histories each), other questions and pairs for the contrast a batch holds."""
        others = max(1, int(self.batch * self.others)) if self.others else 0
        pairs = max(1, others // 2) if self.contrast else 0
        return (self.batch - others - 2 * pairs) // 2, others, pairs

    @model_validator(mode="after")
    def _whole(self):
        if self.groups[0] < self.accumulate:
            raise ValueError(
                f"a batch of {self.batch} holds {self.groups[0]} users, too few for {self.accumulate} pieces: raise "
                "batch or lower accumulate"
            )
        return self


class Extract(StageSection):
    """histories: how many of each user; pictures: the most liked and the most disliked ones in a history."""

    stage = "extract"
    reads = ("data", "mllm", "clip_vision")

    users: Natural = 4000
    histories: Count = 3
    pictures: Count = 8
    batch: Count = 64
    seed: Natural = 9


class ProbeLayers(StageSection):
    """users: in each of the three groups (probes fitted, layers chosen, figures reported). histories: of each user;
    pictures: the most liked and the most disliked ones in a history."""

    stage = "probe_layers"
    reads = ("data", "mllm")

    users: Annotated[int, Field(ge=2)] = 200
    histories: Annotated[int, Field(ge=2)] = 3
    pictures: Count = 8
    seed: Natural = 10


class TrainAlignment(Training):
    """mmd, paired: weights of the two terms; mmd 0 and paired 1 is the point-wise ablation. bank: how many text
    embeddings a step is compared with. hidden: width of the aligner's one hidden layer."""

    stage = "train_alignment"
    reads = ("data", "base")

    steps: Natural = 1200
    batch: Count = 1024
    lr: Rate = 1e-3
    mmd: Weight = 1.0
    paired: Weight = 0.5
    bank: Count = 2048
    hidden: Count = 512
    warmup: Natural = 50
    seed: Natural = 11


class TrainUserAttention(Training):
    """tokens: of a user. distil: share of the loss against the UNet's own answer to the prompt with the taste in it
    (needs a data set with attributes). drop_*: how often a part, the whole user or the text is left out. min_snr: gamma
    of the min-SNR weighting, none for plain. cache_text: keep the text states of every prompt on the disk (a data
    set's; the atelier's prompts have no end). pictures_every: steps between two grids of samples, 0 for none. users:
    how many test users (of a data set: users that training left out) the finished adapter is measured on."""

    stage = "train_user_attention"
    reads = ("data", "base")

    steps: Natural = 800
    batch: Count = 48
    lr: Rate = 1.5e-3
    warmup: Natural = 200
    tokens: Count = 4
    distil: Share = 0.8
    drop_part: Share = 0.08
    drop_user: Share = 0.08
    drop_text: Share = 0.05
    parts: tuple[Part, ...] = Field(PARTS, min_length=1)
    min_snr: Annotated[float, Field(gt=0)] | None = None
    ema: Rate = 0.995
    cache_text: bool = True
    pictures_every: Natural = 0
    users: Natural = 48
    seed: Natural = 12


class Pool(StageSection):
    stage = "atelier.pool"

    count: Count = 40000
    processes: Count = 2
    seed: Natural = 0


class Vae(Training):
    stage = "atelier.vae"

    steps: Natural = 5500
    batch: Count = 16
    lr: Rate = 1.5e-3
    kl: Weight = 1e-4
    seed: Natural = 1


class Judge(Training):
    stage = "atelier.judge"

    steps: Natural = 4000
    batch: Count = 64
    lr: Rate = 2.5e-3
    heldout: Count = 2000
    seed: Natural = 2


class Clip(Training):
    stage = "atelier.clip"

    steps: Natural = 1600
    batch: Count = 96
    lr: Rate = 1e-3
    heads: Weight = 1.0
    seed: Natural = 3


class Unet(Training):
    stage = "atelier.unet"

    steps: Natural = 4600
    batch: Count = 64
    lr: Rate = 1e-3
    empty: Share = 0.1
    neutral: Share = 0.15
    ema: Rate = 0.9985
    pictures: Count = 160
    seed: Natural = 4


class MllmVision(Training):
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


class Config(Section):
    """A whole pipeline. hardware: what it is meant for; expected: the figures to expect, or "not run by us"; devices,
    tflops: how many, and what each is assumed to reach, for the plan alone."""

    hardware: str
    expected: str = "not run by us"
    devices: Count = 1
    tflops: Annotated[float, Field(gt=0)] = 50
    data: Data = Data()
    base: Base = Base()
    mllm: Mllm = Mllm()
    clip_vision: ClipVision = ClipVision()
    atelier: Atelier = Atelier()
    train_mllm: TrainMllm = TrainMllm()
    extract: Extract = Extract()
    probe_layers: ProbeLayers = ProbeLayers()
    train_alignment: TrainAlignment = TrainAlignment()
    train_user_attention: TrainUserAttention = TrainUserAttention()

    @model_validator(mode="after")
    def _whole(self):
        real = self.base.family != "atelier"
        if real != (self.data.path is not None):
            raise ValueError(
                f"base.family {self.base.family} needs data.path" if real else "the atelier draws its own data.path"
            )
        for part, path in (("mllm", self.mllm.path), ("clip_vision", self.clip_vision.path)):
            if real and path is None:
                raise ValueError(f"base.family {self.base.family} needs {part}.path")
        if real and self.base.path is None:
            raise ValueError(f"base.family {self.base.family} needs base.path")
        return self
