"""What a configuration may say. Unknown keys are refused, so a typing error never trains for a week.

One file describes a whole pipeline: the data, the base model, the MLLM, and a section for every stage, named like it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .atelier import Atelier
from .sections import Count, Natural, Rate, Section, Share, StageSection, Training, Weight

PARTS = ("semantic", "core", "image")
# In the paper's order (arXiv 2512.06020).
STAGES = ("train_mllm", "extract", "probe_layers", "train_alignment", "train_user_attention")
Part = Literal["semantic", "core", "image"]
Precision = Literal["fp32", "bf16", "fp16"]
# adamw8bit: its moments take a quarter of the memory (arXiv 2110.02861); needs bitsandbytes. muon: for layers that are
# trained whole (training/common/optim.py); its rates are higher, 3e-3 to 8e-3 in the atelier.
Optimiser = Literal["adamw", "adamw8bit", "muon"]


class Data(Section):
    """Whose taste is learnt."""

    # A folder of the common schema (training/data/schema.py); none for the atelier's simulated users.
    path: Path | None = None
    # What `training.data.vqa` made of that folder.
    questions: Path | None = None
    # Whether the world's attributes may be used; false hides them, as in a set that knows none.
    attributes: bool = True
    # How often a history is read without its prompts, in training the MLLM and after it: a graph has them or not.
    drop_prompts: Share = 0.0


class Base(Section):
    """The frozen diffusion model."""

    family: Literal["atelier", "sd15", "sdxl", "flux"] = "atelier"
    # A diffusers folder; none for the atelier's own.
    path: Path | None = None
    # Side of the training pictures. Of real bases a multiple of 64: the VAE divides by 8, SD1.5's UNet by 8 again.
    pixels: Count = 128
    # Keep the proportions of pictures that aren't square: each is cut to the nearest of the shapes of about pixels²,
    # and a batch has one shape.
    aspects: bool = False
    # Of the frozen UNet; text encoders and VAE stay fp32.
    precision: Precision = "bf16"
    # A public IP-Adapter file whose K and V the branch starts from; the UNet's own without one.
    ip_adapter: Path | None = None
    # Compute the UNet's activations twice rather than store them (arXiv 1604.06174).
    gradient_checkpointing: bool = False
    # 4-bit weights of Flux' frozen transformer; needs bitsandbytes and a graphics card.
    nf4: bool = False

    @model_validator(mode="after")
    def _consistent(self):
        if self.family != "atelier" and self.pixels % 64:
            raise ValueError(f"pixels is {self.pixels}: {self.family} needs a multiple of 64")
        if self.nf4 and self.family != "flux":
            raise ValueError(f"nf4 is for Flux' transformer: {self.family}'s UNet fits without")
        return self


class Lora(Section):
    """Low-rank weights (arXiv 2106.09685) beside the language model's own; vision tower and connector are frozen."""

    # Rank, alpha and dropout as in the public recipe of arXiv 2508.08220, by the paper's first author.
    rank: Count = 8
    # The low-rank product is multiplied by alpha / rank.
    alpha: Annotated[float, Field(gt=0)] = 8
    dropout: Share = 0.1
    # The linear layers of every decoder layer, by their last name.
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Mllm(Section):
    """The multimodal language model."""

    # A transformers folder; none for the atelier's own, which is trained in all its weights.
    path: Path | None = None
    precision: Precision = "bf16"
    # 4-bit weights under the LoRA (QLoRA, arXiv 2305.14314); needs bitsandbytes.
    nf4: bool = False
    # What is trained of a model that has a path; none takes it as it is.
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    # Store the frozen vision tower's image tokens of every picture of the set on the disk, and read each picture once.
    # For small sets: SmolVLM2's are 0.3 MB a picture, Qwen3-VL's several times that.
    cache_vision: bool = False

    @model_validator(mode="after")
    def _consistent(self):
        if self.nf4 and self.lora is None:
            raise ValueError("nf4 weights can't be trained: give mllm.lora")
        if self.lora and self.path is None:
            raise ValueError("the atelier's MLLM is trained whole: mllm.lora needs mllm.path")
        return self


class ClipVision(Section):
    """The image encoder of e_img."""

    # A CLIP folder of transformers or open_clip, or open_clip's weights as a file; none for the atelier's own.
    path: Path | None = None
    # Of such a file: a name of open_clip's, such as ViT-H-14.
    architecture: str | None = None


class ClipText(ClipVision):
    """The text tower that e_sem is aligned with, by the same keys; without a path the base's own text encoders."""


class TrainMllm(Training):
    """Teach the MLLM to read a history."""

    stage = "train_mllm"
    reads = ("data", "mllm")

    steps: Natural = 1600
    batch: Annotated[int, Field(ge=4)] = 32
    lr: Rate = 1e-3
    # Steps of a rising learning rate.
    warmup: Natural = 200
    weight_decay: Weight = 0.01
    # How many training users are read (0: all).
    users: Natural = 20000
    optimiser: Optimiser = "adamw"
    # In a history: so many of the most liked pictures, and so many of the most disliked ones.
    pictures: Count = 8
    # Share of the histories that have 1 to 3 pictures of a verdict; without it every length is about as likely.
    short: Share = 0.0
    # Share of a batch that asks other questions than the closing one (of a data set: data.vqa's).
    others: Share = 0.125
    # Weights of the losses. identity: InfoNCE (arXiv 1807.03748) between two histories of one user; contrast: a liked
    # picture against a disliked one; reading: heads that name the attributes. The answer's weight is 1.
    identity: Weight = 0.3
    contrast: Weight = 0.0
    reading: Weight = 4.0
    # Steps between two measurements of the losses on test users, 0 for none.
    heldout_every: Natural = 0
    # The embedded MLLM's gate: after so many steps preference questions are counted, and below 0.75 the run ends; 0 for
    # none.
    gate_step: Natural = 0
    seed: Natural = 8

    @property
    def groups(self) -> tuple[int, int, int]:
        """How many users (two histories each), other questions and pairs for the contrast a batch holds."""
        others = max(1, int(self.batch * self.others)) if self.others else 0
        pairs = max(1, others // 2) if self.contrast else 0
        return (self.batch - others - 2 * pairs) // 2, others, pairs

    @model_validator(mode="after")
    def _consistent(self):
        if self.groups[0] < self.accumulate:
            raise ValueError(
                f"a batch of {self.batch} holds {self.groups[0]} users, too few for {self.accumulate} pieces: raise "
                "batch or lower accumulate"
            )
        return self


class Extract(StageSection):
    """Read many users' histories once, for the stages after it."""

    stage = "extract"
    reads = ("data", "mllm", "clip_vision")

    # How many training users (0: all), and how many histories of each.
    users: Natural = 4000
    histories: Count = 3
    # In a history: so many of the most liked pictures at most, and so many of the most disliked ones.
    pictures: Count = 8
    # Share of the histories that have 1 to 3 pictures of a verdict; without it the first of a user is as long as it
    # may be, and the others are shorter.
    short: Share = 0.0
    # Whether histories show what their users dislike.
    disliked: bool = True
    # What H is: the MLLM's hidden states, or for comparison, without a decoder, the mean image tokens of the liked and
    # of the disliked pictures, or the means of CLIP's embeddings of them.
    states: Literal["mllm", "tokens", "embeddings"] = "mllm"
    # e_img: of all liked pictures together, or of the last one.
    image: Literal["pooled", "last"] = "pooled"
    # Histories at once.
    batch: Count = 64
    seed: Natural = 9


class ProbeLayers(StageSection):
    """Which decoder layers know the user: e_sem's and e_core's are chosen here (arXiv 2512.06020's probes)."""

    stage = "probe_layers"
    reads = ("data", "mllm")

    # In each of the three groups: probes fitted, layers chosen, figures reported.
    users: Annotated[int, Field(ge=2)] = 200
    # Of each user: a history is told from another user's by one of the same user's.
    histories: Annotated[int, Field(ge=2)] = 3
    pictures: Count = 8
    seed: Natural = 10


class TrainAlignment(Training):
    """Align e_sem with CLIP's text space."""

    stage = "train_alignment"
    reads = ("data", "base", "clip_text")

    steps: Natural = 1200
    # Large, since MMD compares the batch as a set.
    batch: Count = 1024
    lr: Rate = 1e-3
    # What says a user's taste in words: "attributes" of the world, "traits" that an MLLM told (training.data.traits),
    # "prompts" of the liked pictures; "auto" is the first of these that there is.
    target: Literal["auto", "attributes", "traits", "prompts"] = "auto"
    # Weights of the two terms; mmd 0 and paired 1 is the point-wise ablation.
    mmd: Weight = 1.0
    paired: Weight = 0.5
    # Of a user with two tastes: the mean of both texts, or at every step one of them.
    tastes: Literal["mean", "drawn"] = "mean"
    # Whether e_sem is aligned with what the user dislikes too: a second text beside the first.
    dislikes: bool = False
    # How many text embeddings a step is compared with.
    bank: Count = 2048
    # Width of the aligner's one hidden layer.
    hidden: Count = 512
    # Steps between two measurements on held-out users, 0 for one at the end.
    heldout_every: Natural = 0
    warmup: Natural = 50
    seed: Natural = 11


class TrainUserAttention(Training):
    """Train the user cross-attention branch and the projection of the user vector."""

    stage = "train_user_attention"
    reads = ("data", "base")

    steps: Natural = 800
    batch: Count = 48
    lr: Rate = 1.5e-3
    warmup: Natural = 200
    # How many tokens a user is to the branch.
    tokens: Count = 4
    # Share of the loss against the UNet's own answer to the prompt with the taste in it: attributes, or else traits.
    # Where nobody knows the taste in words it is left out.
    distil: Share = 0.8
    # What the UNet is told for that answer: the taste in the prompt's words, or as trait tokens, which the second
    # edition's UNet knows.
    teacher: Literal["words", "traits"] = "words"
    # How far the answer is pushed away from the one to what the user dislikes, as guidance pushes.
    away: Weight = 0.0
    # How often a part of the vector, the whole user or the text is left out, so that each can be weighed by itself and
    # guidance has an unconditional half.
    drop_part: Share = 0.08
    drop_user: Share = 0.08
    drop_text: Share = 0.05
    # What the user vector is made of. The others aren't in the adapter, and stages that they alone need are skipped.
    parts: tuple[Part, ...] = Field(PARTS, min_length=1)
    # gamma of the min-SNR weighting (arXiv 2303.09556, which takes 5); none for plain.
    min_snr: Annotated[float, Field(gt=0)] | None = None
    # Decay of the weights' moving average, which is what the adapter file holds.
    ema: Rate = 0.995
    # Store the text states of every prompt on the disk (a data set's; the atelier's prompts have no end).
    cache_text: bool = True
    # Steps between two grids of samples, 0 for none.
    pictures_every: Natural = 0
    # Steps between two losses of the averaged weights on held-out users (of a data set), 0 for one at the end.
    heldout_every: Natural = 0
    optimiser: Optimiser = "adamw"
    # How many test users (of a data set: users that training left out) the finished adapter is measured on.
    users: Natural = 48
    seed: Natural = 12


class Config(Section):
    """A pipeline from its data to the adapter."""

    # What it is meant for, and the figures to expect.
    hardware: str
    expected: str = "not run by us"
    # Where figures and samples are shown besides log.jsonl.
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    data: Data = Data()
    base: Base = Base()
    mllm: Mllm = Mllm()
    clip_vision: ClipVision = ClipVision()
    clip_text: ClipText = ClipText()
    atelier: Atelier = Atelier()
    train_mllm: TrainMllm = TrainMllm()
    extract: Extract = Extract()
    probe_layers: ProbeLayers = ProbeLayers()
    train_alignment: TrainAlignment = TrainAlignment()
    train_user_attention: TrainUserAttention = TrainUserAttention()

    @property
    def reads_mllm(self) -> bool:
        """Whether a part of the user vector comes from the MLLM."""
        return bool({"semantic", "core"} & set(self.train_user_attention.parts))

    def needs(self, stage: str) -> bool:
        """Whether an adapter of these parts needs a stage."""
        if stage == "train_alignment":
            return "semantic" in self.train_user_attention.parts
        return self.reads_mllm or stage not in ("train_mllm", "probe_layers")

    @model_validator(mode="after")
    def _consistent(self):
        real = self.base.family != "atelier"
        if real and self.data.path is None:
            raise ValueError(f"base.family {self.base.family} needs data.path")
        if real and self.train_user_attention.teacher == "traits":
            raise ValueError("train_user_attention.teacher: only the atelier's UNet knows trait tokens")
        reads_pictures = "image" in self.train_user_attention.parts
        read = {"mllm": (self.reads_mllm, self.mllm.path), "clip_vision": (reads_pictures, self.clip_vision.path)}
        for section, (needed, path) in read.items():
            if real and needed and path is None:
                raise ValueError(f"base.family {self.base.family} needs {section}.path")
        branch = self.train_user_attention
        if self.base.family == "flux" and (branch.tokens not in (4, 16) or branch.min_snr is not None):
            raise ValueError(
                "base.family flux: train_user_attention.tokens is 4 or 16, all that stock diffusers loads there, and "
                "min_snr is for noise that a UNet predicts"
            )
        if real and self.base.path is None:
            raise ValueError(f"base.family {self.base.family} needs base.path")
        return self


def section_kinds() -> dict[str, type[StageSection]]:
    """{stage: its section's class}, of all in STAGES."""
    kinds = (TrainMllm, Extract, ProbeLayers, TrainAlignment, TrainUserAttention)
    return dict(zip(STAGES, kinds, strict=True))
