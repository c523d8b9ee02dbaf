"""Stage 7: vision tower and connector of the SmolVLM, before it learns to read histories.

    python -m training.atelier.mllm_vision --runs runs/atelier

In: the pool's pictures [B, 3, 128, 128] and labels [B, 12]. Out: `eyes.safetensors` (tower and connector) and
`tokens.npy`, float16 [pictures, 4, 192], the image tokens of the whole pool: the language model trains on those.

The tower starts from the CLIP tower's weights; linear heads (thrown away) make its few image tokens name what is in
the picture.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import CLIPModel

from prefgen.atelier.models import load_clip
from prefgen.files import write_atomic

from ..common.config.atelier import MllmVision
from ..common.config.command import arguments
from ..common.files import save_array, save_weights
from ..common.optim import cosine, parameter_groups
from ..common.order import batch_indices
from ..common.run import Run
from ..data.image_tokens import new_mllm, vision_digest, vision_parts
from ..data.picture_pool import PicturePool
from .heads import AttributeHeads

# Pictures, whose tokens are computed together.
TOKENS_AT_ONCE = 128


def main() -> None:
    args = arguments(MllmVision, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = PicturePool(args.runs)
    model = new_mllm()
    print(f"{start_from_clip(model.model.vision_model, load_clip())} tensors from CLIP", flush=True)
    run.warm_start(model, "mllm/model")
    vision = vision_parts(model)
    heads = AttributeHeads(4 * model.config.text_config.hidden_size)
    both = nn.ModuleList([vision, heads])
    optimiser = torch.optim.AdamW(parameter_groups(both, 0.02), betas=(0.9, 0.98))
    run.resume(model=both, optimiser=optimiser)

    for step in run.steps(section.steps):
        chosen = np.sort(batch_indices(section.seed, step, section.batch, pool.train_count))
        with run.timer("data"):
            pictures = pool.batch(chosen)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            tokens = image_tokens(model, pictures).float()
        loss = heads.loss(tokens.flatten(1), torch.from_numpy(pool.labels[chosen]))
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, 100))
        run.log(loss=loss, grad_norm=norm)

    vision.eval()
    with torch.inference_mode():
        starts = tqdm(range(0, len(pool), TOKENS_AT_ONCE), desc="image tokens")
        tokens = torch.cat([image_tokens(model, pool.batch(slice(start, start + TOKENS_AT_ONCE))) for start in starts])
        unseen = torch.from_numpy(pool.labels[pool.train_count :])
        accuracy = heads.accuracy(tokens[pool.train_count :].flatten(1), unseen)
    save_array(tokens.half().numpy(), run.folder / "tokens.npy")
    origin = {"pool": pool.digest, "eyes": vision_digest(model)}
    write_atomic(run.folder / "tokens.json", json.dumps(origin).encode())
    save_weights(vision.state_dict(), run.folder / "eyes.safetensors", dtype=torch.float32)
    run.finish(heads=[round(share, 4) for share in accuracy])


def start_from_clip(vision: nn.Module, model: CLIPModel) -> int:
    """Copy the CLIP tower's matching weights into the SmolVLM tower. Returns how many tensors were copied."""
    clip = model.vision_model.state_dict()
    copied = {}
    for key, value in vision.state_dict().items():
        if key not in clip:
            continue
        # CLIP's first position is that of the class token, which a SmolVLM has not.
        tensor = clip[key][1:] if "position_embedding" in key else clip[key]
        if tensor.shape == value.shape:
            copied[key] = tensor
    vision.load_state_dict(copied, strict=False)
    return len(copied)


def image_tokens(model, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 128, 128] in -1..1 -> image tokens [B, n, 192]."""
    patch = model.config.vision_config.patch_size
    mask = torch.ones(len(pictures), *(side // patch for side in pictures.shape[-2:]), dtype=torch.bool)
    states = model.model.vision_model(pixel_values=pictures, patch_attention_mask=mask).last_hidden_state
    return model.model.connector(states)


if __name__ == "__main__":
    main()
