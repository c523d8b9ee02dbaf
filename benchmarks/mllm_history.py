"""What one more picture costs a preference MLLM: the 21st beside 21 from nothing, and the same history again.

    python benchmarks/mllm_history.py              every family, random weights, vision-tower-dominated sizes
    python benchmarks/mllm_history.py --family NAME

Times are CPU seconds of one process with one thread, so what else runs doesn't disturb them. Writes
docs/performance-mllm.json and, from it, a section of docs/performance.md.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from records import machine, parser_of, publish

from training.evaluation.tables import table

PICTURES = 21
REPEATS = 2
# A vision tower that does nearly all the work, 256 patches a picture, below a small decoder.
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 8}
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
VISION |= {"image_size": 224, "patch_size": 14}
# LLaVA-OneVision keeps a token for every patch, so its tower must be wider to do nearly all the work.
WIDE = VISION | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
QWEN = {"hidden_size": 256, "intermediate_size": 1024, "depth": 6, "num_heads": 8, "patch_size": 14}
QWEN |= {"window_size": 112}  # pixels; Qwen3-VL has no windows
SIDE = {"min_pixels": 224**2, "max_pixels": 224**2, "size": {"shortest_edge": 224, "longest_edge": 224}}


def main() -> None:
    from prefgen.compat import transformers_knows
    from tests.prefgen.tiny_mllms import FAMILIES

    parser = parser_of(__file__, __doc__)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="one of the families; all if left out")
    args = parser.parse_args()
    for family in args.family or FAMILIES:
        if transformers_knows(FAMILIES[family][0]):
            title = "One more picture for a preference MLLM"
            row = measure(family) | {"note": args.note}
            publish(args.out, "performance-mllm.json", row, ("family",), title, page, "families")


def build(folder: Path, family: str) -> Path:
    """A random model of the family whose vision tower does nearly all the work."""
    from tests.prefgen.tiny_mllms import FAMILIES, write_folder

    qwen = FAMILIES[family][0].startswith("qwen")
    vision = QWEN | {"out_hidden_size": TEXT["hidden_size"]} if qwen else VISION
    vision = WIDE if family == "LLaVA-OneVision" else vision
    perceiver = {"hidden_size": TEXT["hidden_size"], "resampler_n_latents": 16}
    text = {key: value for key, value in TEXT.items() if key != "head_dim" or family == "Qwen3-VL"}
    write_folder(folder, family, text=text, vision=vision, perceiver=perceiver)
    (folder / "preprocessor_config.json").write_text(json.dumps(SIDE))
    return folder


def measure(family: str) -> dict:
    """CPU seconds of encoding 21 pictures from nothing, of the 21st, and of the same history again; best of REPEATS."""
    import torch
    import transformers

    from prefgen.history import PreferenceHistory
    from prefgen.mllm.model import PreferenceMLLM

    torch.set_num_threads(1)
    draw = torch.rand(PICTURES, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    histories = {n: PreferenceHistory.from_images(list(draw[: n // 2]), list(draw[n // 2 : n])) for n in (20, 21)}
    histories[20].digest, histories[21].digest  # noqa: B018 the hashes of pictures that came before are kept by nodes
    with tempfile.TemporaryDirectory() as folder:
        loaded = PreferenceMLLM.load(build(Path(folder) / "mllm", family))
    times: dict[str, list[float]] = {"whole": [], "added": [], "again": [], "vision": []}
    for _ in range(REPEATS):
        mllm = fresh(loaded)
        clock = time.process_time()
        mllm.image_features(histories[21].items)
        times["vision"].append(time.process_time() - clock)
        for name, steps in (("whole", [21]), ("added", [20, 21])):
            mllm = fresh(loaded)
            for n in steps:
                clock = time.process_time()
                mllm.encode(histories[n])
                seconds = time.process_time() - clock
            times[name].append(seconds)
        clock = time.process_time()
        mllm.encode(histories[21])
        times["again"].append(time.process_time() - clock)
    # What else runs on the machine only ever adds to a time.
    best = {name: min(values) for name, values in times.items()}
    return {
        "family": family,
        "tokens_a_picture": loaded.family.tokens_per_image,
        "whole_seconds": round(best["whole"], 4),
        "vision_share": round(best["vision"] / best["whole"], 3),
        "added_seconds": round(best["added"], 4),
        "added_share": round(best["added"] / best["whole"], 4),
        "again_milliseconds": round(best["again"] * 1000, 3),
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 2),
        "machine": machine(),
    }


def fresh(loaded):
    """The same model with empty caches."""
    from prefgen.mllm.model import PreferenceMLLM

    preprocessor = {"image_mean": loaded.family.mean, "image_std": loaded.family.std, **SIDE}
    return PreferenceMLLM(loaded.model, loaded.tokenizer, loaded.name, "bench", preprocessor)


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    costs = table(
        ["family", "tokens a picture", "21 from nothing, s", "of it vision", "the 21st, s", "share", "again, ms"],
        [
            [r["family"], r["tokens_a_picture"], str(r["whole_seconds"]), f"{r['vision_share']:.0%}"]
            + [str(r["added_seconds"]), f"{r['added_share']:.1%}", str(r["again_milliseconds"])]
            for r in rows
        ],
    )
    runs = "\n".join(
        f"- {r['family']}: transformers {r['transformers']}, {r['machine']}; load average at the end {r['load']}."
        for r in rows
    )
    return f"""`python benchmarks/mllm_history.py`, record: `performance-mllm.json`. Random models of each family's
real classes at sizes where the vision tower does most of the work. CPU time of one thread, the best of two.

{costs}

Image tokens are kept, the decoder reads the whole history again. Where the decoder is the larger part, as in
a 7B model with 729 tokens a picture (LLaVA-OneVision), one more picture costs nearly as much as all of them.

How each was run:

{runs}
"""


if __name__ == "__main__":
    main()
