"""What differs between MLLM families: where the parts are, how pictures become tokens, and how they stand in the text.

One small class a family; everything else in the package is the same for all. Every picture becomes a square of one
fixed size, so its image tokens depend on nothing but itself and can be cached.

A new family is a subclass of `Family` in FAMILIES, and its name in SUPPORTED. model.py, prompt.py and reading.py ask
the family and its folder's tokenizer, and stay as they are. What else there is to look at:
- ../compat.py: VISION_PARTS, where its vision parts have other names, and what transformers calls otherwise by version;
- training/data/readers.py: how its chat template ends an answer; training/configs/mllm/: a configuration, whose
  `lora.targets` name linear layers of its decoder;
- tests/prefgen/tiny_mllms.py: a tiny random model of it, for every test of families and of training's reader, and
  test_mllm_families.py: the same conversation spelt out for transformers' own forward, which ours must equal;
- ../download/sets.json: a set to fetch; nodes/mllm.py with its page in web/docs: what artists are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..compat import decoder_of, hidden_states_of, image_token_of, merged_tokens, module_of

# How pictures in 0..1 are normalised: as SigLIP's towers take them, and as OpenAI's CLIP does (arXiv 2103.00020).
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIDE = 448  # pixels, for families that read pictures of any size


class Family:
    """What every family has, and what a new one must fill in: `model_types`, `features`, and in its `__init__` what is
    declared below.

    preprocessor: how the folder's image processor is set, empty if it has none. mean, std: of folders without one.
    silent_mean, silent_std: what transformers takes where the folder's says nothing.
    """

    model_types: tuple[str, ...]
    # Sides of a picture and of a patch in pixels, and the tower that sees.
    image_size: int
    patch_size: int
    tokens_per_image: int
    vision: torch.nn.Module

    mean = HALF
    std = HALF
    silent_mean = HALF
    silent_std = HALF
    # Whether the chat template would tear pictures and verdicts apart, so that both go in as text.
    inline = False

    def __init__(self, model, preprocessor: dict | None = None):
        preprocessor = preprocessor or {}
        self.text = decoder_of(model)
        self.image_token_id = image_token_of(model.config)
        if preprocessor:
            self.mean, self.std = normalisation(preprocessor, self.silent_mean, self.silent_std)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pictures [B, 3, S, S] -> image tokens [B, n, D]."""
        raise NotImplementedError

    def image_text(self, image_token: str) -> str:
        """What stands in the text where a chat template writes one image token."""
        return image_token * self.tokens_per_image

    def text_inputs(self, embeds: torch.Tensor, places: torch.Tensor, pictures: torch.Tensor) -> dict:
        """The decoder's arguments. embeds [1, T, D] of the tokens, places [1, T]: image tokens, pictures [n, D]."""
        return {"inputs_embeds": embeds.masked_scatter(places[..., None], pictures)}

    def next_inputs(self, inputs: dict, embeds: torch.Tensor) -> dict:
        """The decoder's arguments for one more token [1, 1, D] after `inputs`, with a cache."""
        return {"inputs_embeds": embeds}


class Idefics3Family(Family):
    """Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): vision tower, pixel-shuffle connector, Llama decoder.
    Pictures are never split."""

    model_types = ("idefics3", "smolvlm")

    def __init__(self, model, preprocessor: dict | None = None):
        super().__init__(model, preprocessor)
        self.vision = module_of(model, "vision_model")
        self.connector = module_of(model, "connector")
        self.image_size = model.config.vision_config.image_size
        self.patch_size = model.config.vision_config.patch_size
        self.tokens_per_image = (self.image_size // self.patch_size // model.config.scale_factor) ** 2

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.connector(self.vision(**unpadded(pixels, self.patch_size)).last_hidden_state)

    def image_text(self, image_token: str) -> str:
        return f"<fake_token_around_image><global-img>{image_token * self.tokens_per_image}<fake_token_around_image>"


class Idefics2Family(Family):
    """Idefics2 (arXiv 2405.02246): vision tower for any size, perceiver resampler to a fixed number of tokens, Mistral
    decoder. Pictures are never split."""

    model_types = ("idefics2",)

    def __init__(self, model, preprocessor: dict | None = None):
        super().__init__(model, preprocessor)
        self.vision = module_of(model, "vision_model")
        self.connector = module_of(model, "connector")
        self.patch_size = model.config.vision_config.patch_size
        largest = model.config.vision_config.image_size
        size = sizes_of(preprocessor or {})
        longest = min(size.get("longest_edge", largest), largest)
        self.image_size = fitting_side(self.patch_size, size.get("shortest_edge", 1), longest)
        self.tokens_per_image = model.config.perceiver_config.resampler_n_latents

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        inputs = unpadded(pixels, self.patch_size)
        states = self.vision(**inputs).last_hidden_state
        return self.connector(states, attention_mask=inputs["patch_attention_mask"].flatten(1))

    def image_text(self, image_token: str) -> str:
        return f"<fake_token_around_image>{image_token * self.tokens_per_image}<fake_token_around_image>"


class LlavaOnevisionFamily(Family):
    """LLaVA-OneVision (arXiv 2408.03326): SigLIP, projector, Qwen2 decoder. A picture is read as one tile and a
    newline, as the family itself reads several pictures; anyres tiles are left out, so every picture has the same
    number of tokens."""

    model_types = ("llava_onevision",)
    silent_mean = CLIP_MEAN
    silent_std = CLIP_STD
    inline = True

    def __init__(self, model, preprocessor: dict | None = None):
        super().__init__(model, preprocessor)
        self.vision = module_of(model, "vision_tower")
        self.projector = module_of(model, "multi_modal_projector")
        self.newline = module_of(model, "image_newline")
        config = model.config
        layers = config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else layers
        self.drop_class = config.vision_feature_select_strategy == "default"
        self.image_size = config.vision_config.image_size
        self.patch_size = config.vision_config.patch_size
        self.tokens_per_image = (self.image_size // self.patch_size) ** 2 + 1

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        states = self.vision(pixel_values=pixels, output_hidden_states=True).hidden_states
        chosen = torch.cat([states[layer] for layer in self.layers], -1)
        tokens = self.projector(chosen[:, 1:] if self.drop_class else chosen)
        return torch.cat([tokens, self.newline.to(tokens).expand(len(tokens), 1, -1)], 1)


class Qwen25VLFamily(Family):
    """Qwen2.5-VL (arXiv 2502.13923): native-resolution vision tower with a patch merger, decoder with positions in
    three dimensions."""

    model_types = ("qwen2_5_vl",)
    mean = CLIP_MEAN
    std = CLIP_STD
    silent_mean = CLIP_MEAN
    silent_std = CLIP_STD

    def __init__(self, model, preprocessor: dict | None = None):
        super().__init__(model, preprocessor)
        self.vision = module_of(model, "visual")
        config = model.config.vision_config
        self.patch_size = config.patch_size
        self.merge = config.spatial_merge_size
        self.frames = config.temporal_patch_size
        self.image_size = fitting_side(self.patch_size * self.merge, *pixel_limits(preprocessor or {}))
        self.side = self.image_size // self.patch_size // self.merge  # of a picture, in tokens
        self.tokens_per_image = self.side**2

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.merged(pixels)[0].unflatten(0, (len(pixels), -1))

    def merged(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Image tokens of all pictures in a row [B * n, D], and those of the deeper layers if the tower has them."""
        grid = self.image_size // self.patch_size
        sizes = torch.tensor([[1, grid, grid]] * len(pixels), device=pixels.device)
        return merged_tokens(self.vision(self.patches(pixels), grid_thw=sizes))

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] -> [B * patches, 3 * frames * patch²], the patches that are merged into a token side by side.
        A still picture fills all frames."""
        along_a_side = (self.side, self.merge, self.patch_size)
        tiles = pixels.reshape(len(pixels), 3, *along_a_side, *along_a_side)
        # [B, token row, token column, patch row, patch column, channel, y, x]
        tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7)
        tiles = tiles[..., None, :, :].expand(*[-1] * 6, self.frames, -1, -1)
        return tiles.flatten(5).flatten(0, 4)

    def text_inputs(self, embeds: torch.Tensor, places: torch.Tensor, pictures: torch.Tensor) -> dict:
        return super().text_inputs(embeds, places, pictures) | {"position_ids": self.positions(places)}

    def next_inputs(self, inputs: dict, embeds: torch.Tensor) -> dict:
        after = inputs["position_ids"].amax().add(1).expand(3, 1, 1)
        return {"inputs_embeds": embeds, "position_ids": after}

    def positions(self, places: torch.Tensor) -> torch.Tensor:
        """[3, 1, T] (time, height, width) of M-RoPE (arXiv 2409.12191): text counts on in all three; a picture stands
        still in time, spreads over rows and columns and takes as many steps as it has rows."""
        token = torch.arange(self.tokens_per_image)
        picture = torch.stack([torch.zeros_like(token), token // self.side, token % self.side])
        is_picture = places[0].tolist()
        spans = []
        position = 0
        at = 0
        while at < len(is_picture):
            if is_picture[at]:
                spans.append(picture + position)
                position += self.side
                at += self.tokens_per_image
            else:
                spans.append(torch.full((3, 1), position))
                position += 1
                at += 1
        return torch.cat(spans, 1)[:, None].to(places.device)


class Qwen3VLFamily(Qwen25VLFamily):
    """Qwen3-VL: as Qwen2.5-VL, and the tower's deeper layers are added to the first decoder layers (DeepStack, arXiv
    2406.04334). A picture's tokens carry them behind their own channels, [n, (1 + deeper layers) * D]."""

    model_types = ("qwen3_vl",)
    mean = HALF
    std = HALF

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens, deeper = self.merged(pixels)
        return torch.cat([tokens, *deeper], -1).unflatten(0, (len(pixels), -1))

    def text_inputs(self, embeds: torch.Tensor, places: torch.Tensor, pictures: torch.Tensor) -> dict:
        own, *deeper = pictures.split(embeds.shape[-1], -1)
        deep = {"visual_pos_masks": places, "deepstack_visual_embeds": deeper}
        return super().text_inputs(embeds, places, own) | deep


@contextmanager
def layer_outputs(decoder: torch.nn.Module, take: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Inside, take(layer, states [B, T, D]) is called after every layer of a decoder. It may raise."""

    def hook_of(layer: int):
        def hook(_module, _inputs, output):
            take(layer, hidden_states_of(output))

        return hook

    # The last layer is taken after the final norm, as transformers' own hidden_states have it.
    taps = [*decoder.layers[:-1], decoder.norm]
    hooks = [module.register_forward_hook(hook_of(layer)) for layer, module in enumerate(taps)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


FAMILIES = (Idefics3Family, Idefics2Family, Qwen25VLFamily, Qwen3VLFamily, LlavaOnevisionFamily)
SUPPORTED = "SmolVLM2, Idefics2, Idefics3, Qwen2.5-VL, Qwen3-VL or LLaVA-OneVision"


def family_of(model_type: str) -> type[Family] | None:
    """The class for a config's model_type, or None for a family that PrefGen doesn't know."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_parts(model, preprocessor: dict | None = None) -> Family:
    """The parts of a loaded model. `preprocessor`: how its folder's image processor is set.

    ValueError for a model of no family of ours, which a folder's check (files.py) has refused before.
    """
    family = family_of(model.config.model_type)
    if family is None:
        raise ValueError(f"{model.config.model_type} is none of {SUPPORTED}.")
    return family(model, preprocessor)


def unpadded(pixels: torch.Tensor, patch_size: int) -> dict:
    """Arguments of the Idefics vision towers for pictures without padding."""
    side = pixels.shape[-1] // patch_size
    mask = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
    return {"pixel_values": pixels, "patch_attention_mask": mask}


def normalisation(preprocessor: dict, mean: tuple, std: tuple) -> tuple[tuple, tuple]:
    """(mean, std), three numbers each, by which an image processor of these settings normalises pictures in 0..1. mean,
    std: where the settings are silent. Pictures that it doesn't bring to 0..1 first are scaled with them."""
    factor = preprocessor.get("rescale_factor")
    scale = 255 * (1 / 255 if factor is None else factor) if preprocessor.get("do_rescale", True) else 255.0
    if preprocessor.get("do_normalize", True):
        mean = _three(preprocessor.get("image_mean"), mean)
        std = _three(preprocessor.get("image_std"), std)
    else:
        mean = (0.0,) * 3
        std = (1.0,) * 3
    if math.isclose(scale, 1, rel_tol=1e-6):
        return mean, std
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def sizes_of(preprocessor: dict) -> dict:
    """The sizes by name; one number for both sides, as old folders have it, limits nothing."""
    sizes = preprocessor.get("size")
    return sizes if isinstance(sizes, dict) else {}


def _three(value: list | float | None, default: tuple) -> tuple:
    """A number for each channel."""
    if value is None:
        return default
    return tuple(value) if isinstance(value, (list, tuple)) else (float(value),) * 3


def fitting_side(unit: int, shortest: float, longest: float) -> int:
    """The multiple of `unit` next below SIDE that keeps to the limits, in pixels; at least one unit."""
    return max(unit, int(min(max(SIDE, shortest), longest)) // unit * unit)


def pixel_limits(preprocessor: dict) -> tuple[float, float]:
    """The least and largest side of a square picture. Qwen's processors count pixels, under two names."""
    size = sizes_of(preprocessor)
    least = preprocessor.get("min_pixels") or size.get("shortest_edge") or 1
    most = preprocessor.get("max_pixels") or size.get("longest_edge") or SIDE**2
    return least**0.5, most**0.5
