"""Stage 9: read many users' histories with the finished MLLM and CLIP, once.

    python -m training.extract --runs runs/atelier

For every training user several histories of different lengths: H (last token of every decoder layer) and the liked
pictures' CLIP image embeddings. Fixed-shape float16 arrays with an index, so that the next stages map them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from prefgen.atelier.models import MLLM_FOLDER, load_clip, mllm_tokenizer

from . import core
from .atelier.clip import image_features
from .atelier.pool import PicturePool
from .config.command import arguments
from .train_mllm import ask, collate, image_tokens_per_picture, last_token_states
from .users_pool import Dealer, interleaved, users_of


def load_mllm():
    """The exported MLLM, as transformers loads it."""
    from transformers import SmolVLMForConditionalGeneration

    return SmolVLMForConditionalGeneration.from_pretrained(str(MLLM_FOLDER), dtype=torch.float32).eval()


@torch.inference_mode()
def clip_embeddings(args, pool: PicturePool) -> torch.Tensor:
    """Unit CLIP image embeddings of the pool [n, 128], float16, computed once."""
    path = args.runs / "clip_images.npy"
    if not path.exists():
        clip, rows = load_clip(), []
        for start in tqdm(range(0, len(pool), 128), desc="clip"):
            rows.append(F.normalize(image_features(clip, pool.batch(slice(start, start + 128))), dim=1).half())
        core.save_array(torch.cat(rows).numpy(), path)
    return torch.from_numpy(np.load(path))


def main() -> None:
    args = arguments("extract", __doc__)
    run = core.Run(args)
    if run.finished:
        return
    pool, tokenizer, model = PicturePool(args.runs), mllm_tokenizer(), load_mllm()
    tokens = torch.from_numpy(np.load(args.runs / "atelier.mllm_vision" / "tokens.npy"))
    images = clip_embeddings(args, pool)
    dealer, people = Dealer(pool.labels[:, 2:]), users_of("train", args.users)
    per_picture, text = image_tokens_per_picture(model), model.model.text_model
    hidden, embeds, owners = [], [], []
    with torch.inference_mode():
        jobs = [(i, k) for i in range(args.users) for k in range(args.histories)]
        for start in tqdm(range(0, len(jobs), args.batch), desc="extract"):
            samples = []
            for i, k in jobs[start : start + args.batch]:
                rng = np.random.default_rng([args.seed, i, k])
                n_liked, n_disliked = (8, 8) if k == 0 else (int(rng.integers(3, 9)), int(rng.integers(0, 9)))
                sample = ask(people[i], dealer, rng, per_picture, True, n_liked, n_disliked)
                liked = images[sample.indices[interleaved(n_liked, n_disliked) < n_liked]].float().mean(0)
                samples.append(sample)
                embeds.append(F.normalize(liked, dim=0))
                owners.append(i)
            inputs, mask, _, last = collate(samples, tokenizer, tokens, model)
            output = text(inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True, use_cache=False)
            hidden.append(last_token_states(output.hidden_states, last).half())
    core.save_array(torch.cat(hidden).numpy(), run.folder / "hidden.npy")
    core.save_array(torch.stack(embeds).half().numpy(), run.folder / "images.npy")
    core.save_array(np.array(owners), run.folder / "owners.npy")
    run.finish(histories=len(owners), users=args.users)


class Extracted:
    """Read access: hidden [n, layers, D], images [n, I], owners [n] (index into the training users)."""

    def __init__(self, runs):
        folder = runs / "extract"
        if not (folder / "done").exists():
            raise SystemExit("No extracted users yet: run `python -m training.extract` first.")
        self.hidden = torch.from_numpy(np.load(folder / "hidden.npy")).float()
        self.images = torch.from_numpy(np.load(folder / "images.npy")).float()
        self.owners = np.load(folder / "owners.npy")


if __name__ == "__main__":
    main()
