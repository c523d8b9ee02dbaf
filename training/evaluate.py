"""What each part of the method brings, on test users and held-out prompts: methods, controls, ablations side by side.

    python -m training.evaluate

Same users, prompts, noise, sampler and base for every row; shipped weights only, nothing is trained. A row's readings
are kept under --runs as soon as it is painted, so the same command goes on where it was stopped. Writes methods.md,
methods.json and figures/history_size.png to --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from prefgen.adapter import UserAdapter, load_adapter
from prefgen.atelier import captions, models, users
from prefgen.atelier.judge import load_judge
from prefgen.atelier.renderer import render
from prefgen.encoded import EncodedPreference
from prefgen.files import write_atomic
from prefgen.fusion import fuse_user_vector
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM

from .atelier.clip import image_features, text_features, tokenize
from .bootstrap import bootstrap, ci95, resampled
from .sampling import decode, sample
from .train_user_attention import install
from .users_pool import users_of

GUIDANCE, STEPS, BATCH, HISTORY_SEED = 3.0, 20, 48, 1
SIZES = (1, 2, 4, 8, 16)

Pictures = list[torch.Tensor]  # each [H, W, 3] in 0..1


@dataclass(frozen=True)
class Row:
    """One way of painting. history: from (liked, disliked) to what the encoder sees, or None for no user.

    size: liked and as many disliked pictures. parts: weights of (semantic, core, image). of_other: the next user's
    history. taste: the true taste is written into the prompt.
    """

    label: str
    history: Callable[[Pictures, Pictures], tuple[Pictures, Pictures]] | None = lambda *sides: sides
    size: int = 8
    parts: tuple[float, float, float] = (1.0, 1.0, 1.0)
    of_other: bool = False
    taste: bool = False


def grey(pictures: Pictures) -> Pictures:
    """Luminance alone."""
    return [p.mean(-1, keepdim=True).expand_as(p).contiguous() for p in pictures]


def colours_only(pictures: Pictures) -> Pictures:
    """The same pixels in random order: all colours in their amounts, nothing else."""
    order = torch.randperm(pictures[0][..., 0].numel(), generator=torch.Generator().manual_seed(0))
    return [p.flatten(0, 1)[order].view_as(p) for p in pictures]


ROWS = {
    "none": Row("no preference", None),
    "mismatched": Row("another user's preference", of_other=True),
    "prefgen": Row("PrefGen"),
    "oracle": Row("true taste in the prompt (ceiling)", None, taste=True),
    "swapped": Row("verdicts swapped", lambda liked, disliked: (disliked, liked)),
    "grey": Row("history without colour", lambda liked, disliked: (grey(liked), grey(disliked))),
    "colours": Row("history of colours only", lambda liked, disliked: (colours_only(liked), colours_only(disliked))),
    "liked_only": Row("liked pictures only", lambda liked, disliked: (liked, [])),
    "no_semantic": Row("without e_sem", parts=(0, 1, 1)),
    "no_core": Row("without e_core", parts=(1, 0, 1)),
    "no_image": Row("without e_img", parts=(1, 1, 0)),
    "semantic": Row("e_sem alone", parts=(1, 0, 0)),
    "core": Row("e_core alone", parts=(0, 1, 0)),
    "image": Row("e_img alone", parts=(0, 0, 1)),
    **{f"size_{n}": Row(f"history of {n} + {n}", size=n) for n in SIZES if n != 8},
}
METHODS = ("none", "mismatched", "prefgen", "oracle")
CONTROLS = ("swapped", "grey", "colours", "liked_only")
PARTS = ("no_semantic", "no_core", "no_image", "semantic", "core", "image")


class Painter:
    """The shipped models, sampled as the training stages do."""

    def __init__(self, adapter: UserAdapter | None = None):
        self.adapter = adapter or load_adapter(models.WEIGHTS / "adapter.safetensors")
        self.clip, self.tokenizer = models.load_clip(), models.clip_tokenizer()
        self.unet, self.vae, self.judge = models.load_unet_diffusers(), models.load_vae_diffusers(), load_judge()
        self.mllm = PreferenceMLLM.load(models.MLLM_FOLDER)
        self.branch = install(self.unet)
        self.empty = text_features(self.clip, tokenize(self.tokenizer, [""]))[0].detach()

    @torch.inference_mode()
    def user_vector(self, liked: Pictures, disliked: Pictures, parts=(1.0, 1.0, 1.0)) -> torch.Tensor:
        """e_u [C + D + I] of a history, as the nodes make it."""
        history = PreferenceHistory.from_images(liked, disliked)
        embeds = [self._image_embeds(pictures) if pictures else None for pictures in (liked, disliked)]
        encoded = EncodedPreference(
            hidden=self.mllm.encode(history),
            image_embed_liked=embeds[0],
            image_embed_disliked=embeds[1],
            mllm=self.mllm.fingerprint,
            clip_vision={"width": embeds[0].shape[1]},
            n_liked=len(liked),
            n_disliked=len(disliked),
            digest=history.digest,
        )
        return fuse_user_vector(self.adapter, encoded, *parts)

    def _image_embeds(self, pictures: Pictures) -> torch.Tensor:
        return F.normalize(image_features(self.clip, torch.stack(pictures).movedim(-1, 1) * 2 - 1), dim=1)

    @torch.inference_mode()
    def paint(self, texts: list[str], vectors: torch.Tensor | None, seed: int = 0) -> torch.Tensor:
        """Pictures [B, 3, 128, 128] in -1..1; vectors [B, C + D + I], or None for no user."""
        keys_values = [None] * len(self.branch) if vectors is None else self.adapter.keys_values(vectors)
        for processor, pair in zip(self.branch, keys_values, strict=True):
            # The unconditional half has no branch: zero values add nothing to it.
            processor.keys_values = pair and (torch.cat([pair[0]] * 2), torch.cat([torch.zeros_like(pair[1]), pair[1]]))
        states = text_features(self.clip, tokenize(self.tokenizer, texts))[0]
        with torch.autocast("cpu", torch.bfloat16):
            latents = sample(self.unet, states, self.empty, GUIDANCE, STEPS, seed=seed)
        return decode(self.vae, latents)


def history_of(person: users.User, size: int) -> tuple[Pictures, Pictures]:
    """(liked, disliked) pictures of a user, `size` of each; a longer history begins with the shorter one."""
    examples = users.history(person, size, size, HISTORY_SEED)
    drawn = [(torch.from_numpy(render(e.scene)).float() / 255, e.liked) for e in examples]
    return [p for p, liked in drawn if liked], [p for p, liked in drawn if not liked]


def requests(people: list[users.User], prompts: int) -> list[tuple[int, str, str]]:
    """(user, subject, prop) of every picture: each user gets `prompts` of the held-out ones, by turns all of them."""
    known = captions.heldout_prompts()
    return [(u, *known[(u * prompts + i) % len(known)]) for u in range(len(people)) for i in range(prompts)]


def paint_row(painter: Painter, row: Row, people: list[users.User], prompts: int) -> Iterator[torch.Tensor]:
    """Paint a row, in the order of `requests`: batches of pictures [B, 3, 128, 128] in -1..1."""
    asked, vectors = requests(people, prompts), None
    if row.history:
        owners = people[1:] + people[:1] if row.of_other else people
        fused = [painter.user_vector(*row.history(*history_of(p, row.size)), row.parts) for p in owners]
        vectors = torch.stack([fused[user] for user, _, _ in asked])
    for start in range(0, len(asked), BATCH):
        texts = [
            captions.enriched(s, p, dict(people[u].tastes[0].liked)) if row.taste else captions.neutral(s, p)
            for u, s, p in asked[start : start + BATCH]
        ]
        yield painter.paint(texts, None if vectors is None else vectors[start : start + BATCH], seed=start)


def read(painter: Painter, pictures: torch.Tensor) -> list[dict]:
    """What the judge sees: {"subject", "attributes"} of every picture [B, 3, H, W] in -1..1."""
    found = painter.judge.read((pictures * 0.5 + 0.5).movedim(1, -1))
    return [{"subject": r["subject"], "attributes": dict(r["attributes"])} for r in found]


def only(person: users.User, families: set[str]) -> users.User | None:
    """The user with opinions on these families only; None when a taste or the dislikes have none there."""
    tastes = tuple(users.Taste(tuple(p for p in t.liked if p[0] in families)) for t in person.tastes)
    disliked = tuple(p for p in person.disliked if p[0] in families)
    return replace(person, tastes=tastes, disliked=disliked) if disliked and all(t.liked for t in tastes) else None


def alignment(readings: list[dict], people: list[users.User | None], asked: list) -> np.ndarray:
    """Mean alignment of every user's pictures, [users]; NaN for a user that is None."""
    values: list[list[float]] = [[] for _ in people]
    for reading, (user, _, _) in zip(readings, asked, strict=True):
        if people[user] is not None:
            values[user].append(users.alignment(reading["attributes"], people[user]))
    return np.array([np.mean(v) if v else np.nan for v in values])


def interval(by_user: np.ndarray) -> dict:
    """{"mean", "ci95", "users"} of `by_user` [users], NaNs left out."""
    known = by_user[~np.isnan(by_user)]
    return {"mean": round(float(known.mean()), 4), "ci95": bootstrap(known), "users": len(known)}


def gain_share(row: np.ndarray, none: np.ndarray, oracle: np.ndarray) -> dict:
    """(row - none) / (oracle - none), of the means; the interval resamples the users of all three together.

    {"mean", "ci95"}; None where the oracle gains nothing, in the mean or in any draw: there is no share of that.
    """
    a, b, c = resampled(np.stack([row, none, oracle]))
    ceiling = oracle.mean() - none.mean()
    share = round(float((row.mean() - none.mean()) / ceiling), 4) if ceiling > 0 else None
    return {"mean": share, "ci95": ci95((a - b) / (c - b)) if (c > b).all() else None}


def measure(readings: dict[str, list[dict]], people: list[users.User], asked: list) -> dict:
    """Everything the page says, from the readings of every row."""
    by_user = {name: alignment(found, people, asked) for name, found in readings.items()}
    rows = {}
    for name, found in readings.items():
        right = np.array([r["subject"] == subject for r, (_, subject, _) in zip(found, asked, strict=True)], float)
        rows[name] = {
            "label": ROWS[name].label,
            "alignment": interval(by_user[name]),
            "minus_prefgen": interval(by_user[name] - by_user["prefgen"]),
            "gain_share": gain_share(by_user[name], by_user["none"], by_user["oracle"]),
            "subject": interval(right.reshape(len(people), -1).mean(1)),
        }
    two = np.array([len(p.tastes) > 1 for p in people])
    families = {f for f, _ in people[0].disliked}.union(*({f for f, _ in t.liked} for p in people for t in p.tastes))
    groups = {"users with one taste": ~two, "users with two tastes": two}
    split = {
        label: {name: interval(by_user[name][mask]) for name in METHODS} for label, mask in groups.items() if mask.any()
    }
    for label, kept in (("palette alone", {"palette"}), ("all families but the palette", families - {"palette"})):
        narrowed = [only(person, kept) for person in people]
        if any(narrowed):
            split[label] = {name: interval(alignment(readings[name], narrowed, asked)) for name in METHODS}
    return {"rows": rows, "groups": split}


def page(result: dict) -> str:
    """methods.md."""
    rows, groups = result["rows"], result["groups"]

    def span(entry: dict) -> str:
        mean = "-" if entry["mean"] is None else f"{entry['mean']:.3f}"
        return mean if entry["ci95"] is None else f"{mean} ({entry['ci95'][0]:.3f} to {entry['ci95'][1]:.3f})"

    def table(names) -> str:
        head = "| picture | alignment | less PrefGen | share of the oracle's gain | subject named |\n"
        return f"{head}|---|---|---|---|---|\n" + "\n".join(
            f"| {r['label']} | {span(r['alignment'])} | {'' if n == 'prefgen' else span(r['minus_prefgen'])} | "
            f"{span(r['gain_share'])} | {r['subject']['mean']:.3f} |"
            for n, r in ((n, rows[n]) for n in names)
        )

    sizes = ["prefgen" if n == 8 else f"size_{n}" for n in SIZES]
    apart = "| pictures of | users | " + " | ".join(ROWS[n].label for n in METHODS) + " |\n|---|---|---|---|---|---|\n"
    apart += "\n".join(
        f"| {label} | {g['none']['users']} | " + " | ".join(span(g[n]) for n in METHODS) + " |"
        for label, g in groups.items()
    )
    return f"""# What each part of the method brings

`{result["command"]}`: {result["users"]} users of the test split, {result["prompts"]} held-out prompts
each (by turns all twenty), so {result["pictures"]} pictures a row; the same noise in every row. Guidance {GUIDANCE},
{STEPS} DDIM steps, histories of 8 + 8 unless said otherwise. Intervals: 95 %, bootstrap over users; "less PrefGen" is
paired. Shipped weights, nothing trained for this page, one training seed. [methods.json](methods.json) has every
figure, the seeds, the versions and the weights' checksums.

## Methods

{table(METHODS)}

## Controls and histories

Colours only: the pixels of each history picture in random order. Swapped: liked pictures shown as disliked and the
reverse.

{table(("prefgen", *CONTROLS))}

## Parts of the user vector, by the artist's weights

Training drops each part at times, so that a weight of 0 is a case the branch knows.

{table(("prefgen", *PARTS))}

## Size of the history

{table(sizes)}

![Alignment by the number of liked and of disliked pictures](figures/history_size.png)

## Users and families apart

Alignment over a part of the families counts users who like and dislike something in it.

{apart}

## What is not here

Whatever needs other weights: an image-only adapter trained on the same data, prompt enrichment by the MLLM, reference
attention, a point-wise loss in place of MMD, an untuned MLLM, other layers. FID, KID, CMMD, diversity and the metrics
of real base models are not measured either.
"""


def figure(rows: dict, path: Path) -> None:
    """Alignment by history size, with none and oracle as bands."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = [rows["prefgen" if n == 8 else f"size_{n}"]["alignment"] for n in SIZES]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, colour in (("oracle", "tab:green"), ("none", "tab:grey")):
        axes.axhspan(*rows[name]["alignment"]["ci95"], color=colour, alpha=0.2, label=rows[name]["label"])
    means = np.array([e["mean"] for e in entries])
    error = np.abs(np.array([e["ci95"] for e in entries]).T - means)
    axes.errorbar(SIZES, means, error, marker="o", capsize=3, label="PrefGen")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [f"{n} + {n}" for n in SIZES])
    axes.set(xlabel="liked + disliked pictures", ylabel="alignment")
    axes.legend(loc="center right", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def checksums() -> dict[str, str]:
    """SHA-256 of every weights file, by its name in the weights folder."""
    files = sorted(models.WEIGHTS.rglob("*.safetensors"))
    return {str(f.relative_to(models.WEIGHTS)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts a user")
    parser.add_argument("--runs", type=Path, default=Path("runs/evaluate"), help="where finished rows are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for all")
    args = parser.parse_args()
    if args.users < 2 or args.prompts < 1:
        parser.error("at least 2 users (one user's preference is tried on another) and 1 prompt are needed")
    if args.threads:
        torch.set_num_threads(args.threads)
    people, weights = users_of("test", args.users), checksums()
    asked = requests(people, args.prompts)
    key = hashlib.sha256(
        json.dumps([weights, args.users, args.prompts, GUIDANCE, STEPS, HISTORY_SEED]).encode()
    ).hexdigest()[:16]
    kept, readings, painter = args.runs / key, {}, None
    with tqdm(total=len(ROWS) * len(asked), unit="picture") as bar:
        for name, row in ROWS.items():
            path = kept / f"{name}.json"
            bar.set_postfix_str(row.label, refresh=False)
            if path.exists():
                bar.update(len(asked))
            else:
                painter, found = painter or Painter(), []
                for pictures in paint_row(painter, row, people, args.prompts):
                    found += read(painter, pictures)
                    bar.update(len(pictures))
                write_atomic(path, json.dumps(found).encode())
            readings[name] = json.loads(path.read_text())
    result = {
        "command": "python -m training.evaluate" + (f" {shlex.join(sys.argv[1:])}" if sys.argv[1:] else ""),
        "users": len(people),
        "user_ids": [p.id for p in people],
        "prompts": args.prompts,
        "pictures": len(asked),
        "guidance": GUIDANCE,
        "steps": STEPS,
        "history_seed": HISTORY_SEED,
        "noise_seeds": "10000 * batch start + place in the batch",
        "versions": {m.__name__: m.__version__ for m in (torch, np)},
        "weights": weights,
        **measure(readings, people, asked),
    }
    figure(result["rows"], args.out / "figures" / "history_size.png")
    write_atomic(args.out / "methods.json", json.dumps(result, indent=1).encode() + b"\n")
    write_atomic(args.out / "methods.md", page(result).encode())
    for entry in result["rows"].values():
        low, high = entry["alignment"]["ci95"]
        print(f"{entry['label']:<36} {entry['alignment']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
