"""How fast the user branch trains, beside a plain port of the public IP-Adapter recipe at equal settings.

    python benchmarks/user_attention_throughput.py                     quarter width, 256 px
    python benchmarks/user_attention_throughput.py --width 1 --precision bf16 --peak-tflops 989    an H100

Both train K, V and an image projection beside the same frozen SD1.5-shaped UNet with random weights, on the same
pictures and prompts: ours by the real script, with latents and text states from its caches; the port encodes the
picture with the VAE, the prompt with CLIP, and the picture again with CLIP ViT-H at every step, as the published
recipe does. They take turns. Writes docs/performance-training.json and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from records import ROOT, machine, parser_of, publish, reached

from training.evaluation.tables import table

BAR = 1.5
# Our log has a line at step 0 and one at step 20.
STEPS = 21
# Of the published IP-Adapter for SD1.5.
TOKENS = 4
WIDTH = 768


def write_base(folder: Path, width: float) -> None:
    """SD1.5's UNet and VAE at `width` of their channels, CLIP's towers at `width` of theirs; random weights."""
    import diffusers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from prefgen.atelier.models import CLIP_TOKENIZER

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), model_max_length=77)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # The UNet reads states 768 wide whatever its own width, so the text tower is made shallower instead.
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        num_hidden_layers=round(12 * width**2) or 1,
        num_attention_heads=12,
        intermediate_size=3072,
        **ids,
    )
    vision = CLIPVisionConfig(
        hidden_size=round(1280 * width),
        intermediate_size=round(5120 * width),
        num_hidden_layers=32,
        num_attention_heads=round(16 * width),
        patch_size=14,
        projection_dim=1024,
        hidden_act="gelu",
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=tuple(round(c * width) for c in (128, 256, 512, 512)),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=16,
        ),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=tuple(round(c * width) for c in (320, 640, 1280, 1280)),
            cross_attention_dim=768,
            norm_num_groups=16,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "base")
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "vision")


def write_world(folder: Path, args) -> None:
    """Data, what the stages before leave, the configuration, and a trained alignment."""
    from tests.training.tiny_bases import write_upstream
    from training.data.agents.make import Population, make
    from training.data.agents.renderers import Atelier

    write_base(folder, args.width)
    make(Population(20, 60, 3, 20, Atelier(max(256, args.pixels)), None), folder / "agents", processes=1)
    write_upstream(folder / "runs", folder / "agents")
    # Without a teacher's pass, which the published recipe doesn't have: both sides do the same work.
    stage = {"steps": STEPS, "batch": args.batch, "distil": 0.0, "lr": 1e-4, "users": 1}
    content = {
        "hardware": "a benchmark",
        "data": {"path": str(folder / "agents")},
        "base": {"family": "sd15", "path": str(folder / "base"), "pixels": args.pixels, "precision": args.precision},
        "mllm": {"path": "none"},
        "clip_vision": {"path": str(folder / "vision")},
        "train_alignment": {"steps": 2, "batch": 32},
        "train_user_attention": stage,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    stage_of(folder, "train_alignment", folder / "runs")


def stage_of(folder: Path, name: str, runs: Path) -> None:
    line = [sys.executable, "-m", f"training.{name}", "--config", str(folder / "run.yaml"), "--runs", str(runs)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)


def ours(folder: Path) -> dict:
    """Seconds of a step of the real script and their split, the mean of steps 1 to 20. The caches are kept."""
    runs = folder / "runs"
    shutil.rmtree(runs / "train_user_attention", ignore_errors=True)
    stage_of(folder, "train_user_attention", runs)
    lines = (runs / "train_user_attention/log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["seconds"]


class IPAttention(torch.nn.Module):
    """The published cross-attention: text attention plus attention to the picture's tokens, with K and V of its own."""

    def __init__(self, hidden: int, text_width: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.to_k_ip = torch.nn.Linear(text_width, hidden, bias=False)
        self.to_v_ip = torch.nn.Linear(text_width, hidden, bias=False)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        from prefgen.branch import scaled_dot_product

        # CLIP's text has 77 tokens; the picture's stand behind them, as IP-Adapter has it (arXiv 2308.06721).
        query = attn.to_q(hidden_states)
        text, picture = encoder_hidden_states.split([77, self.tokens], 1)
        out = scaled_dot_product(query, attn.to_k(text), attn.to_v(text), attn.heads)
        out = out + scaled_dot_product(query, self.to_k_ip(picture), self.to_v_ip(picture), attn.heads)
        return attn.to_out[1](attn.to_out[0](out))


def install_port(unet, device: str) -> torch.nn.ModuleList:
    """Put the port's attention into a UNet, K and V from the text's, and return its modules."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    processors = {}
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        if not name.endswith("attn2.processor"):
            processors[name] = AttnProcessor2_0()
            continue
        processors[name] = IPAttention(layer.to_k.out_features, WIDTH, TOKENS).to(device)
        processors[name].to_k_ip.weight.data.copy_(layer.to_k.weight.float())
        processors[name].to_v_ip.weight.data.copy_(layer.to_v.weight.float())
    unet.set_attn_processor(dict(processors))
    return torch.nn.ModuleList(each for each in processors.values() if isinstance(each, IPAttention))


class Laps:
    """Seconds by name; a lap goes from the end of the one before to its own, when a GPU has done its work."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def plain(folder: Path, args) -> dict:
    """The same for the port: everything frozen is run at every step."""
    from PIL import Image
    from transformers import CLIPVisionModelWithProjection

    from training.common.bases import load_base
    from training.common.config.command import load
    from training.data.worlds import DataSetWorld

    config = load(folder / "run.yaml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(config, device)
    world = DataSetWorld(folder / "agents")
    vision = CLIPVisionModelWithProjection.from_pretrained(str(folder / "vision"))
    vision.eval().requires_grad_(False).to(device)
    branch = install_port(base.unet, device)
    projection = torch.nn.Linear(1024, TOKENS * WIDTH).to(device)
    norm = torch.nn.LayerNorm(WIDTH).to(device)
    trained = torch.nn.ModuleList([projection, norm, branch])
    # IP-Adapter's own settings (arXiv 2308.06721, section 4.1).
    optimiser = torch.optim.AdamW(trained.parameters(), 1e-4, weight_decay=0.01)
    rng = np.random.default_rng(0)
    users = world.users("train")
    laps = Laps(device)
    for step in range(STEPS):
        if step == 1:  # the first one warms up
            laps = Laps(device)
            began = time.perf_counter()
        wanted = [world.target(int(u), rng) for u in rng.choice(users, args.batch)]
        pictures = world.pictures([target.picture for target in wanted])
        # CLIP ViT-H/14 reads 224 x 224.
        small = np.stack([np.asarray(Image.fromarray(p).resize((224, 224))) for p in pictures])
        pixels = torch.from_numpy(small).movedim(-1, 1).to(device).float() / 127.5 - 1
        laps.end("pictures read")
        with torch.no_grad():
            latents = base.latents(pictures)[0].to(device)
            laps.end("VAE")
            text = base.encode_text([target.prompt for target in wanted])
            laps.end("text encoder")
            with base.autocast():
                embeds = vision(pixels).image_embeds.float()
            laps.end("image encoder")
        timesteps = torch.randint(0, len(base.schedule), (args.batch,)).to(device)
        noisy, target = base.schedule.add_noise(latents, torch.randn(latents.shape).to(latents.device), timesteps)
        with base.autocast():
            picture_tokens = norm(projection(embeds).unflatten(-1, (TOKENS, WIDTH)))
        text.states = torch.cat([text.states, picture_tokens.float()], 1)
        loss = torch.nn.functional.mse_loss(base.predict(noisy, timesteps, text), target)
        laps.end("forward")
        loss.backward()
        laps.end("backward")
        optimiser.step()
        optimiser.zero_grad()
        laps.end("optimiser")
    total = time.perf_counter() - began
    return {name: round(s / (STEPS - 1), 4) for name, s in laps.seconds.items()} | {
        "step": round(total / (STEPS - 1), 4)
    }


def unet_flops(folder: Path, args) -> float:
    """Floating-point operations of one forward and backward pass of the UNet with the branch, a step."""
    from torch.utils.flop_counter import FlopCounterMode

    from training.common.base import Text
    from training.common.bases import load_base
    from training.common.config.command import load
    from training.common.user_branch import connect, install, own_projections

    base = load_base(load(folder / "run.yaml"))
    branch = install(base.unet, fused=True)
    side = args.pixels // 8
    tokens = torch.randn(args.batch, 4, 768, requires_grad=True)
    connect(branch, [(tokens @ k.float().T, tokens @ v.float().T) for k, v in own_projections(base.unet)])
    with FlopCounterMode(display=False) as counter:
        noisy = torch.randn(args.batch, 4, side, side)
        base.predict(
            noisy, torch.zeros(args.batch, dtype=torch.long), Text(torch.randn(args.batch, 77, 768))
        ).sum().backward()
    return counter.get_total_flops()


def measure(args) -> Iterator[dict]:
    """The record after every round."""
    folder = Path(tempfile.mkdtemp())
    line = [sys.executable, __file__, *sys.argv[1:], "--plain", str(folder)]
    try:
        write_world(folder, args)
        flops = unet_flops(folder, args)
        rounds = []
        for number in range(args.rounds + 1):
            measured = ours(folder)
            if number == 0:  # it filled the caches
                continue
            theirs = subprocess.run(line, check=True, capture_output=True, text=True)
            rounds.append({"plain": json.loads(theirs.stdout.splitlines()[-1]), "ours": measured})
            yield entry_of(args, rounds, flops)
    finally:
        shutil.rmtree(folder)


def entry_of(args, rounds: list[dict], flops: float) -> dict:
    step = {side: float(np.median([r[side]["step"] for r in rounds])) for side in ("plain", "ours")}
    ratios = sorted(r["plain"]["step"] / r["ours"]["step"] for r in rounds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    entry = {
        "width": args.width,
        "pixels": args.pixels,
        "batch": args.batch,
        "precision": args.precision,
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1),
        "rounds": len(rounds),
        "samples_per_second": {side: round(args.batch / s, 3) for side, s in step.items()},
        "ratio": {
            "median": round(float(np.median(ratios)), 2),
            "min": round(ratios[0], 2),
            "max": round(ratios[-1], 2),
        },
        "seconds": {side: median_split([r[side] for r in rounds]) for side in ("plain", "ours")},
        "unet_gflop_a_step": round(flops / 1e9, 1),
    }
    if args.peak_tflops and device != "CPU":
        entry["mfu"] = round(flops / step["ours"] / (args.peak_tflops * 1e12), 3)
    return entry


def median_split(rounds: list[dict]) -> dict[str, float]:
    return {name: round(float(np.median([r[name] for r in rounds])), 4) for name in rounds[0]}


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    about = __doc__.split("\n\n")[2].partition("Writes")[0].replace("\n", " ")
    head = ["width", "px", "batch", "precision", "device, threads", "port, samples/s", "ours", "ratio (min to max)"]
    parts = [
        "`python benchmarks/user_attention_throughput.py`, record: `performance-training.json`.",
        textwrap.fill(about, 116),
        f"The bar is {BAR} times the port's samples a second. Width 1 is SD1.5 and CLIP ViT-H as published.",
        table([*head, f"at least {BAR}", "MFU"], map(rate_row, rows)),
    ]
    for row in rows:
        parts += [
            f"### Where a step's time goes: width {row['width']:g}, {row['pixels']} px, {row['device']}",
            f"Median of {row['rounds']} rounds of {STEPS - 1} steps, in seconds. {row['machine']}; load average "
            f"{row['load']}: what is more than the threads is other work on the same cores.",
            split_table(row["seconds"]),
        ]
    return "\n\n".join(parts)


def rate_row(row: dict) -> list:
    ratio = row["ratio"]
    rate = row["samples_per_second"]
    return [
        f"{row['width']:g}",
        row["pixels"],
        row["batch"],
        row["precision"],
        f"{row['device']}, {row['threads']}",
    ] + [
        str(rate["plain"]),
        str(rate["ours"]),
        f"{ratio['median']} ({ratio['min']} to {ratio['max']})",
        reached(ratio["median"] >= BAR),
        str(row.get("mfu", "not run")),
    ]


def split_table(seconds: dict[str, dict[str, float]]) -> str:
    """Where a step's time goes, for both sides."""
    names = list(dict.fromkeys([*seconds["plain"], *seconds["ours"]]))
    sides = {"the port": seconds["plain"], "ours": seconds["ours"]}
    return table(["", *names], [[label, *(str(side.get(n, "-")) for n in names)] for label, side in sides.items()])


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--width", type=float, default=0.25, help="share of the published channels: 0.25, 0.5 or 1")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in this precision, for the MFU")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain(args.plain, args)))
        return
    same = ("width", "pixels", "batch", "precision", "device")
    for entry in measure(args):
        row = entry | {"note": args.note}
        publish(args.out, "performance-training.json", row, same, "Training the user branch", page)


if __name__ == "__main__":
    main()
