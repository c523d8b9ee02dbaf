"""Stage 7: vision tower and connector of the SmolVLM, before its language model learns.

    python -m training.atelier.world.mllm_vision --runs runs/world

In: the pool's pictures [B, 3, 128, 128] with what they show. Out: `eyes.safetensors` (tower and connector) and
`tokens.npy`, float16 [pictures, 16, 192], the image tokens of the whole pool: the language model trains on those.

The tower starts from the CLIP tower's weights. Linear heads (thrown away) make its image tokens tell what is in the
picture, the traits without words too: this is the world's pretraining, as a public MLLM's tower has seen the web. No
later stage has heads on true traits.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import SmolVLMForConditionalGeneration

from prefgen.atelier.models import load_clip, mllm_config
from prefgen.files import write_atomic

from ...common.config.command import arguments
from ...common.config.world import WorldMllmVision
from ...common.files import save_array, save_weights
from ...common.optim import cosine, optimiser_of
from ...common.order import batch_indices
from ...common.run import Run
from ...data.image_tokens import vision_digest, vision_parts
from ...data.world_pool import WorldPool
from ..mllm_vision import image_tokens, start_from_clip
from .heads import TraitHeads

# Pictures, whose tokens are computed together.
TOKENS_AT_ONCE = 128


def main() -> None:
    args = arguments(WorldMllmVision, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = WorldPool(args.runs)
    model = SmolVLMForConditionalGeneration(mllm_config())
    copied = start_from_clip(model.model.vision_model, load_clip())
    print(f"{copied} tensors from CLIP", flush=True)
    vision = vision_parts(model)
    width = model.config.text_config.hidden_size
    heads = TraitHeads(16 * width)
    both = nn.ModuleList([vision, heads])
    optimiser = optimiser_of(section.optimiser, both, 0.02, (0.9, 0.98))
    run.resume(model=both, optimiser=optimiser)

    for step in run.steps(section.steps):
        chosen = np.sort(batch_indices(section.seed, step, section.batch, pool.train_count))
        with run.timer("data"):
            pictures = pool.batch(chosen)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            tokens = image_tokens(model, pictures).float().flatten(1)
        reading = heads.class_loss(tokens, pool.classes[chosen])
        values = heads.value_loss(tokens, pool.values[chosen], pool.seen[chosen])
        norm = run.optimise(reading + values, optimiser, cosine(step, section.steps, section.lr, 100))
        run.log(reading=reading, values=values, grad_norm=norm)

    vision.eval()
    with torch.inference_mode():
        starts = tqdm(range(0, len(pool), TOKENS_AT_ONCE), desc="image tokens", mininterval=5)
        tokens = torch.cat([image_tokens(model, pool.batch(slice(start, start + TOKENS_AT_ONCE))) for start in starts])
    save_array(tokens.half().numpy(), run.folder / "tokens.npy")
    origin = {"pool": pool.digest, "eyes": vision_digest(model)}
    write_atomic(run.folder / "tokens.json", json.dumps(origin).encode())
    save_weights(vision.state_dict(), run.folder / "eyes.safetensors", dtype=torch.float32)
    unseen = slice(pool.train_count, None)
    run.finish(**heads.figures(tokens[unseen].flatten(1), pool.classes[unseen], pool.values[unseen], pool.seen[unseen]))


if __name__ == "__main__":
    main()
