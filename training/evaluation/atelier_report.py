"""Write docs/evidence/atelier.md and .json: every figure of a finished pipeline beside the bar that it should reach.

    python -m training.evaluation.atelier_report --runs runs/atelier --demo output/demo/report.json \\
        --wide output/wide/report.json

Reads each stage's `done`, `config.json` and `log.jsonl`, and the reports of the demo: the usual one, and a wide one
over all held-out prompts (`python -m scripts.demo --users 8 --prompts 20 --out output/wide`). Measures nothing itself.
A stage that these runs leave as it was shipped (the base with `BASE=shipped`, or all before the branch) keeps what
atelier.json says of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prefgen.atelier.attributes import FAMILIES
from prefgen.files import read_text, write_atomic

from . import probe_page
from .tables import table

OUT = Path(__file__).parents[2] / "docs" / "evidence"
# Those of training/runs/atelier.sh that leave figures.
STAGES = (
    *("atelier.pool", "atelier.vae", "atelier.clip", "atelier.judge", "atelier.unet", "atelier.mllm_vision"),
    *("train_mllm", "extract", "probe_layers", "train_alignment", "train_user_attention"),
)
LABELS = {
    "none": "without preference",
    "mismatched": "another user's preference",
    "prefgen": "the user's own preference",
    "oracle": "likes written into the prompt",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.atelier_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/atelier"))
    parser.add_argument("--demo", type=Path, default=Path("output/demo/report.json"))
    parser.add_argument("--wide", type=Path, default=Path("output/wide/report.json"))
    parser.add_argument("--out", type=Path, default=OUT, help="where atelier.md and atelier.json go")
    args = parser.parse_args()
    earlier = args.out / "atelier.json"
    record = json.loads(read_text(earlier)) if earlier.exists() else {}
    stages = {stage: of_stage(stage, args.runs, record) for stage in STAGES}
    figures = {stage: figures for stage, (figures, _) in stages.items()}
    figures["settings"] = {stage: settings for stage, (_, settings) in stages.items()}
    demo = read(args.demo)
    wide = read(args.wide)
    write_atomic(args.out / "atelier.md", page(figures, demo, wide).encode())
    record = figures | {"demo": demo, "wide": wide}
    write_atomic(args.out / "atelier.json", json.dumps(record, indent=1).encode() + b"\n")
    for what, measured, reached in bars(demo, wide, figures["atelier.judge"]["heldout_accuracy"]):
        print(f"{'reached' if reached else 'MISSED ':<8} {what}: {measured}")


def read(path: Path) -> dict:
    if not path.exists():
        raise SystemExit(f"{path} is missing: finish the pipeline and run both demos first.")
    return json.loads(read_text(path))


def of_stage(stage: str, runs: Path, record: dict) -> tuple[dict, dict]:
    """(figures, settings) of a stage: of its run, or of the record for a stage that stays as it was shipped."""
    folder = runs / stage
    if stage in record and not ((folder / "done").exists() and read(folder / "config.json").get("steps", 1)):
        return record[stage], record["settings"][stage]
    settings = read(folder / "config.json")
    if (folder / "log.jsonl").exists():
        settings["minutes"] = round(seconds(folder / "log.jsonl") / 60, 1)
    return read(folder / "done"), settings


def seconds(log: Path) -> float:
    """Time that a stage worked, from its log; the pause before a resumed run does not count."""
    times = [json.loads(line)["time"] for line in read_text(log).splitlines()]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    # A stage writes its log at even steps: a gap far above the usual one is the pause before it was resumed.
    usual = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
    return sum(gap for gap in gaps if gap < 10 * usual + 60)


def page(figures: dict, demo: dict, wide: dict) -> str:
    """atelier.md."""
    judged = figures["atelier.judge"]["heldout_accuracy"]
    unet = figures["atelier.unet"]
    return f"""# What the shipped atelier weights can do

All figures were measured on the shipped files. `python -m training.evaluation.atelier_report` puts this page together
from the stages' and the demo's own records; [atelier.json](atelier.json) holds them all. How they came about and
what they don't say stands in [notes.md](notes.md).

## The bars

{bar_table(demo, wide, judged)}

## The main job

`{demo["command"]}`: {demo["alignment"]["none"]["n"]} pictures a row,
{demo["users"]} users of the test split, each with 8 liked and 8 disliked pictures,
times {demo["prompts"]} prompts that no training stage saw, in {demo["seconds"]:.0f} s on two cores.
Intervals: bootstrap over users. Alignment is the share of a user's liked families that the judge sees satisfied, less
the share of disliked attributes that it sees.

{demo_table(demo)}

Share of the oracle's gain that the preference reaches: **{demo["gain_share"]:.2f}**.

`{wide["command"]}`: {wide["users"]} users times all {wide["prompts"]} held-out prompts,
{wide["alignment"]["none"]["n"]} pictures a row.

{demo_table(wide)}

## The judge on fresh renders

`python -m training.atelier.judge`: 2,000 renders of held-out prompts with seeds outside the pool.

{table(list(judged), [list(judged.values())])}

## What the UNet draws when the prompt asks for it

`python -m training.atelier.unet`: {unet["pictures"]} pictures of held-out prompts with five attributes each, and as
many without any; the share in which the judge sees the attribute. The subject is named in
{unet["enriched"]["subject"]:.3f} of the first and {unet["neutral"]["subject"]:.3f} of the second.

{prompt_table(unet)}

## The other stages

{stage_table(figures)}

### What each decoder layer knows (`python -m training.probe_layers`)

{probe_page.page(figures["probe_layers"])}
## Settings of the runs

{settings_table(figures["settings"])}
"""


def demo_table(report: dict) -> str:
    rows = []
    for condition, label in LABELS.items():
        entry = report["alignment"][condition]
        subject = report["subject_accuracy"][condition]
        low, high = entry["ci95"]
        rows.append([label, entry["mean"], f"{low:.3f} to {high:.3f}", f"{subject['mean']:.2f}"])
    return table(["picture", "alignment", "95 % interval", "subject named by the judge"], rows)


def bars(demo: dict, wide: dict, judged: dict) -> list[tuple[str, str, bool]]:
    """(what is asked, what was measured, reached) for every bar of the main job."""
    checks = []
    for name, report in (("demo", demo), ("all held-out prompts", wide)):
        mean = {c: report["alignment"][c]["mean"] for c in LABELS}
        interval = {c: report["alignment"][c]["ci95"] for c in LABELS}
        subject = {c: report["subject_accuracy"][c]["mean"] for c in LABELS}
        ceiling = mean["oracle"] - mean["none"]
        clear = interval["prefgen"][0] - max(interval["none"][1], interval["mismatched"][1])
        other = report["differences"]["mismatched - none"]["ci95"]
        checks += [
            (f"{name}: oracle - none at least 0.3", f"{ceiling:.3f}", ceiling >= 0.3),
            (f"{name}: share of that gain at least 0.5", f"{report['gain_share']:.2f}", report["gain_share"] >= 0.5),
            (f"{name}: interval of prefgen clear of none and mismatched", f"by {clear:.3f}", clear > 0),
            (f"{name}: mismatched not above none", f"{other[0]:.3f} to {other[1]:.3f}", other[0] <= 0),
            (f"{name}: subject without preference at least 0.85", f"{subject['none']:.3f}", subject["none"] >= 0.85),
            (
                f"{name}: subject as often with preference, within 0.05",
                f"{subject['prefgen'] - subject['none']:+.3f}",
                subject["prefgen"] - subject["none"] >= -0.05,
            ),
        ]
    low = {head: value for head, value in judged.items() if value < 0.95}
    words = ", ".join(f"{head} {value:.3f}" for head, value in low.items()) or f"lowest {min(judged.values()):.3f}"
    return [*checks, ("judge: every head at least 0.95 on fresh renders of held-out prompts", words, not low)]


def bar_table(demo: dict, wide: dict, judged: dict) -> str:
    return table(
        ["what is asked", "measured", "reached"],
        [[asked, measured, "yes" if reached else "**no**"] for asked, measured, reached in bars(demo, wide, judged)],
    )


def prompt_table(unet: dict) -> str:
    """How often the UNet draws an attribute that the prompt asks for, and one that it doesn't."""
    rows = []
    for family, values in FAMILIES.items():
        # "-": nobody asked for it
        shares = [unet[prompts].get(family, "-") for prompts in ("enriched", "neutral")]
        rows.append([family, *shares, 1 / len(values)])
    return table(["family", "asked for", "not asked for", "chance"], rows)


def stage_table(figures: dict) -> str:
    """One line a stage."""
    clip = figures["atelier.clip"]
    heads = figures["atelier.mllm_vision"]["heads"]
    mllm = figures["train_mllm"]
    probe = figures["probe_layers"]
    alignment = figures["train_alignment"]
    branch = figures["train_user_attention"]
    lines = {
        "VAE (8x, 8 channels)": f"mean absolute error {figures['atelier.vae']['l1']:.3f} on -1..1",
        "CLIP": (
            f"caption retrieval among 1,024 unseen renders: top-1 {clip['retrieval_top1']:.3f} with full captions; a "
            f"linear head on the image embedding names the subject in {clip['image_heads']['subject']:.2f} of them"
        ),
        "MLLM, vision": (
            f"linear heads on the four image tokens of unseen renders: subject {heads[0]:.3f}, prop {heads[1]:.3f}, "
            f"families {min(heads[2:]):.3f} to {max(heads[2:]):.3f}"
        ),
        f"MLLM, histories of 8 + 8, {mllm['users']} test users": (
            f"precision at k: liked {mllm['liked_precision']:.3f}, disliked {mllm['disliked_precision']:.3f}; the same "
            f"user found again by another history among {mllm['users']}: {mllm['same_user_top1']:.3f}"
        ),
        "layers": f"e_sem: {probe['sem_layers']}; e_core: {probe['core_layer']}",
        f"alignment, {alignment['candidates']} held-out users": (
            f"MMD {alignment['heldout_mmd']:.4f}; retrieval top-1 {alignment['retrieval_top1']:.3f}, "
            f"top-5 {alignment['retrieval_top5']:.3f}; cosine {alignment['heldout_cosine']:.3f}"
        ),
        "user attention, 48 test users, one picture each": ", ".join(f"{name} {branch[name]:.3f}" for name in LABELS),
    }
    return table(["stage", "figure"], lines.items())


def settings_table(settings: dict) -> str:
    rows = [
        [name, s.get("steps", ""), s.get("batch", ""), str(s.get("lr", ""))]
        + [f"{s['minutes']:.0f}" if "minutes" in s else ""]
        for name, s in settings.items()
    ]
    return table(["stage", "steps", "batch", "learning rate", "minutes"], rows)


if __name__ == "__main__":
    main()
