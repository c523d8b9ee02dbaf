"""Tiny random models of every MLLM family that PrefGen reads histories with, as folders that transformers wrote."""

import json

import torch

SPECIALS = (
    "<pad> <unk> <|im_start|> <end_of_utterance> <image> <fake_token_around_image> <global-img> <|vision_start|> "
    "<|vision_end|> <|image_pad|> <|im_end|>"
).split()
WORDS = "User Assistant user assistant liked disliked What does this like avoid a boat cat : ? ( ) yes no".split()
LAYERS, WIDTH = 4, 32
TEXT = {
    "vocab_size": len(SPECIALS + WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large enough for every picture and word to leave its mark on the last token
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}
QWEN_VISION = {
    "depth": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": WIDTH,
    "initializer_range": 0.3,
}
MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 1, 1]}
PERCEIVER = {
    "resampler_n_latents": 3,
    "resampler_depth": 2,
    "resampler_n_heads": 2,
    "resampler_head_dim": 8,
    "num_key_value_heads": 1,
    "hidden_size": WIDTH,
}
# As the families' own templates write a conversation.
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for line in message['content'] %}"
    "{% if line['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ line['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for line in message['content'] if line['type'] == 'image' %}<image>{% endfor %}"
    "{% for line in message['content'] if line['type'] == 'text' %}{{ '\n' + line['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# family -> (model_type, image token, chat template, preprocessor_config.json, side of a picture)
FAMILIES = {
    "SmolVLM2": ("smolvlm", "<image>", IDEFICS_TEMPLATE, {}, 16),
    "Idefics3": ("idefics3", "<image>", IDEFICS_TEMPLATE, {}, 16),
    "Idefics2": (
        "idefics2",
        "<image>",
        IDEFICS_TEMPLATE,
        {"size": {"shortest_edge": 8, "longest_edge": 13}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3] * 3},
        12,
    ),
    "Qwen2.5-VL": ("qwen2_5_vl", "<|image_pad|>", QWEN_TEMPLATE, {"min_pixels": 64, "max_pixels": 26 * 26}, 24),
    "Qwen3-VL": (
        "qwen3_vl",
        "<|image_pad|>",
        QWEN_TEMPLATE,
        {"size": {"shortest_edge": 64, "longest_edge": 26 * 26}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        24,
    ),
    "LLaVA-OneVision": ("llava_onevision", "<image>", LLAVA_TEMPLATE, {}, 16),
}

# bitsandbytes' CPU kernels want rows by 32, columns by 64. Weights of about 1 / sqrt(width) round as trained ones do.
NF4_TEXT = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 16, "num_key_value_heads": 4}
NF4_SIZES = {"text": NF4_TEXT | {"initializer_range": 0.09}, "perceiver": {"hidden_size": 128}}


def write_nf4_folder(folder, family):
    """A folder whose decoder bitsandbytes can pack on the CPU."""
    eyes = {"vision": {"out_hidden_size": 128}} if family.startswith("Qwen") else {}
    return write_folder(folder, family, **NF4_SIZES, **eyes)


def config_of(model_type, **sizes):
    """The tiny config; sizes: {"text": {...}, "vision": {...}} of larger ones."""
    from transformers import AutoConfig

    text, vision = TEXT | sizes.get("text", {}), VISION | sizes.get("vision", {})
    ids = {"image_token_id": SPECIALS.index("<image>")}
    qwen = {"image_token_id": SPECIALS.index("<|image_pad|>"), "video_token_id": len(SPECIALS + WORDS) - 1}
    qwen |= {"vision_start_token_id": SPECIALS.index("<|vision_start|>")}
    if model_type in ("smolvlm", "idefics3"):
        options = {"text_config": text | {"model_type": "llama"}, "vision_config": vision, "scale_factor": 2} | ids
    elif model_type == "idefics2":
        options = {"text_config": text | {"model_type": "mistral"}, "vision_config": vision} | ids
        options["perceiver_config"] = PERCEIVER | sizes.get("perceiver", {})
    elif model_type == "llava_onevision":
        options = {
            "text_config": text | {"model_type": "qwen2"},
            "vision_config": vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_index": ids["image_token_id"],
            "video_token_index": len(SPECIALS + WORDS) - 1,
            "image_grid_pinpoints": [[16, 16], [16, 32]],
        }
    elif model_type == "qwen2_5_vl":
        eyes = QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1, 3]} | sizes.get("vision", {})
        options = text | {"rope_scaling": MROPE, "vision_config": eyes} | qwen  # flat, as the released folders are
    else:
        eyes = QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
        rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
        options = {"text_config": text | {"head_dim": 8, "rope_scaling": rope}, **qwen}
        options["vision_config"] = eyes | sizes.get("vision", {})
    return AutoConfig.for_model(model_type, **options)


def write_model(folder, model_type, seed=0, **sizes):
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config_of(model_type, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and any(part in name for part in ("connector", "merger", "projector", "patch_embed")):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def write_tokenizer(folder, chat_template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIALS + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIALS)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", chat_template=chat_template
    ).save_pretrained(folder)


def memory_bytes(mllm) -> int:
    """Bytes that a loaded MLLM's weights take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in mllm.model.parameters())


def write_folder(folder, family, **options):
    """A whole folder of a family; options: those of write_model."""
    model_type, _, template, preprocessor, _ = FAMILIES[family]
    write_model(folder, model_type, **options)
    write_tokenizer(folder, template)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
