"""Published judges of pictures from real base models: PickScore, CSD, the ViPer proxy, and CLIP-T and CLIP-I.

Small implementations around transformers' own models; every one takes its weights by path and never downloads. Pictures
are PIL images in RGB. ScoreError is one sentence that names the file and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from prefgen.compat import dtype_option, embedding_of, load_image_text_to_text, lost_its_head
from prefgen.errors import MendableError
from prefgen.mllm.lora import merge_lora

BATCH = 16
LIKE, DISLIKE = "▁+", "▁-"  # the ViPer proxy's two answers, as Idefics2's vocabulary writes a word
# What transformers and safetensors raise for a broken folder. Not TypeError: that would be a call of ours.
BROKEN = (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError)
VIPER_SIZE = {"longest_edge": 448, "shortest_edge": 378}
# CSD's published weights name their parts as OpenAI's CLIP does.
OPENAI_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
OPENAI_PARTS = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}


class ScoreError(MendableError):
    """Weights that can't be used: one sentence."""


def clip_pixels(pictures: Sequence[Image.Image], side: int) -> torch.Tensor:
    """[B, 3, side, side] as CLIP wants them: shorter side resized (bicubic), middle cut out, normalised."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return processor(images=list(pictures), return_tensors="pt").pixel_values


class Clip:
    """A transformers CLIP folder: CLIP-T, CLIP-I, and PickScore when the folder holds PickScore's weights."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import CLIPModel, CLIPTokenizerFast

        try:
            model = CLIPModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, **dtype_option(dtype)
            )
            self.tokenizer = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except BROKEN as error:
            raise ScoreError(
                f"{folder} is no CLIP folder of transformers with safetensors weights: download it whole."
            ) from error
        self.model = model.to(device).eval()
        self.side = self.model.config.vision_config.image_size

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit image embeddings, float32 [B, d]."""
        rows = []
        for start in range(0, len(pictures), BATCH):
            pixels = clip_pixels(pictures[start : start + BATCH], self.side).to(self.model.device, self.model.dtype)
            rows.append(embedding_of(self.model.get_image_features(pixel_values=pixels)).float().cpu())
        return F.normalize(torch.cat(rows), dim=1)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit text embeddings, float32 [B, d]; a prompt is cut after CLIP's 77 tokens."""
        limit = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return F.normalize(
            embedding_of(self.model.get_text_features(**inputs.to(self.model.device))).float().cpu(), dim=1
        )

    def fidelity(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """CLIP-T: cosine between each picture and its prompt, [B]."""
        return (self.images(pictures) * self.texts(prompts)).sum(1)

    def pickscore(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """logit_scale times that cosine, [B]: PickScore when the weights are (Kirstain et al., arXiv 2305.01569)."""
        return self.model.logit_scale.detach().float().exp().cpu() * self.fidelity(pictures, prompts)


class Csd(nn.Module):
    """Style descriptors (Somepalli et al., arXiv 2404.01292): CLIP's vision tower and a projection to style.

    file: safetensors of the published weights, named as OpenAI's CLIP or as transformers' names the tower. The authors
    say that the weights they published don't reproduce their paper's figures; a report has to repeat that.
    """

    DISCLAIMER = "CSD's authors state that the published weights differ from those behind their paper's figures."

    def __init__(self, file: Path):
        super().__init__()
        from safetensors.torch import load_file
        from transformers import CLIPVisionModel

        try:
            state = {key.removeprefix("module."): value.float() for key, value in load_file(str(file)).items()}
            style = state["last_layer_style"]
            tower = transformers_names(
                {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
            )
            self.backbone = CLIPVisionModel(vision_config(tower)).eval()
            own = self.backbone.state_dict()  # with the prefix that this version of transformers wants, or without
            prefix = "vision_model." if any(key.startswith("vision_model.") for key in own) else ""
            missing, unknown = self.backbone.load_state_dict({prefix + k: v for k, v in tower.items()}, strict=False)
            if unknown or [key for key in missing if not key.endswith("position_ids")]:
                raise KeyError((missing or unknown)[0])
        except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
            raise ScoreError(
                f"{file} holds no CSD weights as safetensors ({error}): convert the published ones."
            ) from error
        self.register_buffer("style", style)

    @torch.inference_mode()
    def forward(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit style descriptors, float32 [B, s]."""
        side, rows = self.backbone.config.image_size, []
        for start in range(0, len(pictures), BATCH):
            pixels = clip_pixels(pictures[start : start + BATCH], side).to(self.style.device)
            rows.append((self.backbone(pixel_values=pixels).pooler_output @ self.style).cpu())
        return F.normalize(torch.cat(rows), dim=1)


def transformers_names(tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vision tower's tensors under transformers' names, from those or from OpenAI's."""
    if "conv1.weight" not in tower:
        return {k.removeprefix("vision_model."): v for k, v in tower.items() if not k.endswith("position_ids")}
    renamed = {}
    for key, value in tower.items():
        if key in OPENAI_PARTS:
            renamed[OPENAI_PARTS[key]] = value
        elif key.startswith("transformer.resblocks."):
            number, _, rest = key.removeprefix("transformer.resblocks.").partition(".")
            layer = f"encoder.layers.{number}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for name, part in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}self_attn.{name}_proj.{kind}"] = part
            else:
                name, _, kind = rest.rpartition(".")
                renamed[f"{layer}{OPENAI_BLOCK[name]}.{kind}"] = value
        elif key != "proj":
            raise KeyError(key)
    return renamed


def vision_config(tower: dict[str, torch.Tensor]):
    """CLIPVisionConfig of a tower in transformers' names, from its shapes; OpenAI's towers have heads of 64."""
    from transformers import CLIPVisionConfig

    width, _, patch, _ = tower["embeddings.patch_embedding.weight"].shape
    grid = round((len(tower["embeddings.position_embedding.weight"]) - 1) ** 0.5)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tower["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(k.split(".")[2]) for k in tower if k.startswith("encoder.layers.")),
        num_attention_heads=max(1, width // 64),
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
    )


class ViperProxy:
    """How much a user would like a picture, 0..1 (Salehi et al., arXiv 2407.17365): Idefics2-8B and its LoRA, asked for
    a "+" or a "-" after the user's disliked and liked pictures by turns.

    folder: Idefics2 as transformers has it; lora: the published PEFT folder, merged.
    """

    def __init__(self, folder: Path, lora: Path | None, device: str = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(
                str(folder), local_files_only=True, size=VIPER_SIZE, do_image_splitting=False
            )
            self.model = load_image_text_to_text(Path(folder), dtype)
        except BROKEN as error:
            raise ScoreError(f"{folder} can't be loaded as Idefics2 ({error}): download it whole.") from error
        if lost_its_head(self.model):
            raise ScoreError(f"{folder} has no language head to answer with: take Idefics2 as it was released.")
        if lora is not None:
            merge_lora(self.model, Path(lora))
        self.model.to(device).eval()
        self.answers = [self.processor.tokenizer.convert_tokens_to_ids(word) for word in (DISLIKE, LIKE)]
        if len(set(self.answers)) < 2:
            raise ScoreError(
                f"{folder} has another vocabulary than Idefics2: it doesn't know {LIKE!r} and {DISLIKE!r}."
            )

    @torch.inference_mode()
    def score(
        self, liked: Sequence[Image.Image], disliked: Sequence[Image.Image], pictures: Sequence[Image.Image]
    ) -> torch.Tensor:
        """[B] for pictures of one user, in float32. As many liked as disliked ones are shown."""
        pairs = list(zip(disliked, liked, strict=False))
        asked = "User:<image>Score for this image?<end_of_utterance>\nAssistant: "
        prompt = "".join(f"{asked}{sign}<end_of_utterance>\n" for _ in pairs for sign in "-+") + asked
        context = [picture for pair in pairs for picture in pair]
        found = []
        for picture in pictures:
            inputs = self.processor(text=prompt, images=[[*context, picture]], return_tensors="pt")
            logits = self.model(**inputs.to(self.model.device, self.model.dtype)).logits[0, -1]
            found.append(logits[self.answers].float().softmax(0)[1].cpu())
        return torch.stack(found)
