"""A tiny CLIP of random weights, as a folder that transformers wrote."""

import json

import torch

TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
SIDE, PATCH = 32, 8
LIMIT = 24  # tokens of a text
TEXT = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": LIMIT}


def write_tokenizer(folder):
    """CLIP's tokenizer over single letters; returns its vocabulary's size."""
    from transformers import CLIPTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz,"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LIMIT)
    tokenizer.save_pretrained(folder)
    return len(words)


def write(folder, seed=0, projection=16):
    """A CLIPModel with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    text = TOWER | TEXT | {"vocab_size": write_tokenizer(folder)}
    torch.manual_seed(seed)
    vision = TOWER | {"image_size": SIDE, "patch_size": PATCH}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)).save_pretrained(folder)
    return folder
