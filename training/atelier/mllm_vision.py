"""Stage 7: the MLLM's eyes: vision tower and connector of the SmolVLM, before it learns to read histories.

    python -m training.atelier.mllm_vision --runs runs/atelier

The tower starts from the CLIP tower's weights; linear heads (thrown away) make its few image tokens name what is in
the picture. Then the tokens of the whole pool are cached: the language model trains on those.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from prefgen.atelier.models import load_clip, mllm_config
from prefgen.files import write_atomic

from ..common.cache import digest_of
from ..common.config.command import arguments
from ..common.files import save_array, save_weights
from ..common.optim import cosine, parameter_groups
from ..common.order import batch_indices
from ..common.run import Run
from .clip import AttributeHeads
from .pool import PicturePool


def new_mllm():
    """SmolVLMForConditionalGeneration from the atelier's config, freshly initialised."""
    from transformers import SmolVLMForConditionalGeneration

    torch.manual_seed(7)
    return SmolVLMForConditionalGeneration(mllm_config())


def start_from_clip(vision: nn.Module) -> int:
    """Copy the CLIP tower's matching weights into the SmolVLM tower. Returns how many tensors were copied."""
    clip = load_clip().vision_model.state_dict()
    own = vision.state_dict()
    copied = {}
    for key, value in own.items():
        source = {"embeddings.position_embedding.weight": "embeddings.position_embedding.weight"}.get(key, key)
        if source not in clip:
            continue
        tensor = clip[source][1:] if "position_embedding" in key else clip[source]  # CLIP's first is the class token
        if tensor.shape == value.shape:
            copied[key] = tensor
    vision.load_state_dict(copied, strict=False)
    return len(copied)


def image_tokens(model, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 128, 128] in -1..1 -> image tokens [B, 4, 192]."""
    mask = torch.ones(
        len(pictures), *(s // model.config.vision_config.patch_size for s in pictures.shape[-2:]), dtype=torch.bool
    )
    states = model.model.vision_model(pixel_values=pictures, patch_attention_mask=mask).last_hidden_state
    return model.model.connector(states)


def eyes_digest(model) -> str:
    """Of what makes the image tokens, at the precision in which the MLLM's folder stores it."""
    return digest_of(copy.deepcopy(model.model.vision_model).half(), copy.deepcopy(model.model.connector).half())


def main() -> None:
    args = arguments("atelier.mllm_vision", __doc__)
    run = Run(args)
    if run.finished:
        return
    pool = PicturePool(args.runs)
    train_count = pool.train_count
    model = new_mllm()
    print(f"{start_from_clip(model.model.vision_model)} tensors from CLIP", flush=True)
    run.warm_start(model, "mllm/model")
    eyes = nn.ModuleDict({"vision": model.model.vision_model, "connector": model.model.connector})
    width = 4 * model.config.text_config.hidden_size
    heads = AttributeHeads(width)
    both = nn.ModuleList([eyes, heads])
    optimiser = torch.optim.AdamW(parameter_groups(both, 0.02), betas=(0.9, 0.98))
    run.resume(model=both, optimiser=optimiser)
    for step in run.steps(args.steps):
        chosen = np.sort(batch_indices(args.seed, step, args.batch, train_count))
        with run.timer("data"):
            pictures = pool.batch(chosen)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            tokens = image_tokens(model, pictures).float()
        loss = heads.loss(tokens.flatten(1), torch.from_numpy(pool.labels[chosen]))
        norm = run.optimise(loss, optimiser, cosine(step, args.steps, args.lr, 100))
        run.log(loss=loss, grad_norm=norm)

    eyes.eval()
    tokens = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(pool), 128), desc="image tokens"):
            tokens.append(image_tokens(model, pool.batch(slice(start, start + 128))))
        tokens = torch.cat(tokens)
        accuracy = [
            (head(tokens[train_count:].flatten(1)).argmax(1).numpy() == pool.labels[train_count:, i]).mean()
            for i, head in enumerate(heads.heads)
        ]
    save_array(tokens.half().numpy(), run.folder / "tokens.npy")
    made_of = {"pool": pool.digest, "eyes": eyes_digest(model)}
    write_atomic(run.folder / "tokens.json", json.dumps(made_of).encode())
    save_weights(eyes.state_dict(), run.folder / "eyes.safetensors", dtype=torch.float32)
    run.finish(heads=[round(float(a), 4) for a in accuracy])


if __name__ == "__main__":
    main()
