"""Published judges of pictures from real base models: PickScore, CSD, the ViPer proxy, and CLIP-T and CLIP-I.

Small implementations around transformers' own models; every one takes its weights by path and never downloads. Pictures
are PIL images in RGB. ScoreError is one sentence that names the file and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError

from prefgen.clip import (
    BROKEN_FOLDER,
    MEAN,
    PICTURES_AT_ONCE,
    STD,
    ClipError,
    clip_pixels,
    is_open_clip,
    load_open_clip,
    load_tokenizer,
)
from prefgen.compat import (
    absent,
    dtype_option,
    embedding_of,
    from_safetensors,
    load_image_text_to_text,
    lost_its_head,
)
from prefgen.errors import MendableError
from prefgen.mllm.lora import merge_lora

# The ViPer proxy's two answers, as Idefics2's vocabulary writes a word.
LIKE = "▁+"
DISLIKE = "▁-"
# As the proxy's authors have Idefics2 read pictures, without splitting them.
VIPER_SIZE = {"longest_edge": 448, "shortest_edge": 378}


class ScoreError(MendableError):
    """Weights that can't be used: one sentence."""


@torch.inference_mode()
def unit_embeddings(
    embed: Callable[[torch.Tensor], torch.Tensor],
    pictures: Sequence[Image.Image],
    side: int,
    weight: torch.Tensor,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> torch.Tensor:
    """Unit embeddings, float32 [B, d] on the CPU, of pixels on the device and in the dtype of `weight`."""
    rows = []
    for start in range(0, len(pictures), PICTURES_AT_ONCE):
        pixels = clip_pixels(pictures[start : start + PICTURES_AT_ONCE], side, mean, std).to(weight)
        rows.append(embed(pixels).float().cpu())
    return F.normalize(torch.cat(rows), dim=1)


class Clip:
    """A CLIP of transformers or open_clip: CLIP-T, CLIP-I, and PickScore when the folder holds PickScore's weights.

    path, architecture: as of prefgen.clip.ClipVision.
    """

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        architecture: str | None = None,
    ):
        self._mean: Sequence[float] = MEAN
        self._std: Sequence[float] = STD
        if is_open_clip(path):
            self._open_clip(path, device, dtype, architecture)
        elif architecture:
            raise ScoreError(f"{path} says itself what it is: leave --clip-architecture out.")
        else:
            self._transformers(path, device, dtype)

    def _open_clip(self, path: Path, device: str, dtype: torch.dtype, architecture: str | None) -> None:
        try:
            opened = load_open_clip(path, architecture)
        except ClipError as error:
            raise ScoreError(str(error)) from error
        self.model = opened.model.to(device, dtype)
        self.side = opened.side
        self._mean = opened.mean
        self._std = opened.std
        self._embed_images = self.model.encode_image
        self._embed_texts = lambda texts: self.model.encode_text(opened.tokens(texts).to(device))

    def _transformers(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        from transformers import CLIPModel

        try:
            model, loading = from_safetensors(CLIPModel, folder, **dtype_option(dtype))
        except BROKEN_FOLDER as error:
            raise ScoreError(
                f"{folder} is no CLIP folder of transformers or open_clip with safetensors weights: download it whole."
            ) from error
        try:
            tokenizer = load_tokenizer(folder)
        except ClipError as error:
            raise ScoreError(str(error)) from error
        # Such as the text side of a folder that holds a vision tower alone.
        if lacking := absent(loading):
            raise ScoreError(f"{folder} lacks {lacking[0]} and is no whole CLIP: download it whole.")
        self.model = model.to(device).eval()
        self.side = model.config.vision_config.image_size
        limit = model.config.text_config.max_position_embeddings
        padding = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        self._embed_images = lambda pixels: embedding_of(model.get_image_features(pixel_values=pixels))
        self._embed_texts = lambda texts: embedding_of(
            model.get_text_features(**tokenizer(texts, **padding).to(device))
        )

    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit image embeddings, float32 [B, d]."""
        weight = self.model.logit_scale
        return unit_embeddings(self._embed_images, pictures, self.side, weight, self._mean, self._std)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit text embeddings, float32 [B, d]; a prompt is cut after CLIP's 77 tokens."""
        return F.normalize(self._embed_texts(list(prompts)).float().cpu(), dim=1)

    def fidelity(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """CLIP-T: cosine between each picture and its prompt, [B]."""
        return (self.images(pictures) * self.texts(prompts)).sum(1)

    def pickscore(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """logit_scale times that cosine, [B]: PickScore when the weights are (Kirstain et al., arXiv 2305.01569)."""
        return self.model.logit_scale.detach().float().exp().cpu() * self.fidelity(pictures, prompts)


class Csd:
    """Style descriptors (Somepalli et al., arXiv 2404.01292): CLIP's ViT-L/14 tower and a projection to style.

    file: the published weights as safetensors, under their own names, which are open_clip's, or under transformers', as
    the one public copy in safetensors has them. The authors say that the weights they published don't reproduce their
    paper's figures; a report has to repeat that.
    """

    DISCLAIMER = "CSD's authors state that the published weights differ from those behind their paper's figures."

    def __init__(self, file: Path, device: str = "cpu"):
        from safetensors.torch import load_file

        try:
            weights = {key.removeprefix("module."): value.float() for key, value in load_file(str(file)).items()}
            tower = {
                key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")
            }
            # The style projection stands where CLIP has its own, so that the tower's output is the descriptor.
            self.model = vision_tower(open_clip_names(tower) | {"proj": weights["last_layer_style"]}).to(device)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ScoreError(
                f"{file} holds no CSD weights as safetensors, named as they are published ({reason}): convert those."
            ) from error

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit style descriptors, float32 [B, s]."""
        return unit_embeddings(self.model, pictures, self.model.image_size[0], self.model.proj)


# A vision tower's parts in transformers and in open_clip.
PART_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_names(tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vision tower's tensors under open_clip's names, from those or from transformers'."""
    if "conv1.weight" in tower:
        return tower
    state = {}
    for key, value in tower.items():
        name = key.removeprefix("vision_model.")
        for theirs, ours in PART_NAMES.items():
            name = name.replace(theirs, ours)
        if not name.endswith("position_ids"):
            state[name] = value
    # open_clip has the three projections of an attention in one.
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return state


def vision_tower(state: dict[str, torch.Tensor]):
    """open_clip's vision transformer with these weights, its sizes read off their shapes. KeyError or RuntimeError for
    weights that aren't such a tower's."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    width, _, patch, _ = state["conv1.weight"].shape
    grid = round((len(state["positional_embedding"]) - 1) ** 0.5)
    tower = VisionTransformer(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        layers=len([key for key in state if key.endswith("ln_1.weight")]),
        # OpenAI's towers have heads of 64, and GELU in its quick form.
        heads=max(1, width // 64),
        mlp_ratio=len(state["transformer.resblocks.0.mlp.c_fc.weight"]) / width,
        output_dim=state["proj"].shape[1],
        act_layer=QuickGELU,
    )
    tower.load_state_dict(state)
    return tower.eval()


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
        except BROKEN_FOLDER as error:
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
        question = "User:<image>Score for this image?<end_of_utterance>\nAssistant: "
        # The proxy was trained on a disliked and a liked picture by turns, each with its answer, then the one to score.
        prompt = "".join(f"{question}{sign}<end_of_utterance>\n" for _ in pairs for sign in "-+") + question
        context = [picture for pair in pairs for picture in pair]
        scores = []
        for picture in pictures:
            inputs = self.processor(text=prompt, images=[[*context, picture]], return_tensors="pt")
            logits = self.model(**inputs.to(self.model.device, self.model.dtype)).logits[0, -1]
            scores.append(logits[self.answers].float().softmax(0)[1].cpu())
        return torch.stack(scores)
