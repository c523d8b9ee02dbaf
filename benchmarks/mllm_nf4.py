"""How far H drifts in bf16 and in nf4 from fp32, on the CPU: the embedded MLLM and tiny random ones of every family.

python benchmarks/mllm_nf4.py        needs bitsandbytes and accelerate; prints the table of docs/performance.md
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import records  # noqa: F401  puts the repository on the path

from training.evaluation.tables import table


def main() -> None:
    from prefgen.atelier.models import MLLM_FOLDER
    from prefgen.compat import has_nf4, transformers_knows
    from tests.prefgen.tiny_mllms import FAMILIES, write_nf4_folder

    argparse.ArgumentParser(prog="python benchmarks/mllm_nf4.py", description=__doc__.splitlines()[0]).parse_args()
    if not has_nf4():
        raise SystemExit("Packing into 4 bits needs bitsandbytes and accelerate: pip install both.")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"atelier, trained": MLLM_FOLDER}
        for family, (model_type, *_) in FAMILIES.items():
            if transformers_knows(model_type):
                folders[f"{family}, random"] = write_nf4_folder(Path(scratch) / family, family)
        rows = [[name, *(f"{cosine:.4f}" for cosine in drift(folder))] for name, folder in folders.items()]
        print(table(["MLLM", "bf16", "nf4 in fp32", "nf4 in bf16"], rows))


def drift(folder: Path) -> list[float]:
    """The least cosine to fp32 over the layers and the example users, in bf16, nf4 in fp32 and nf4 in bf16."""
    import torch
    from torch.nn.functional import cosine_similarity

    from prefgen.atelier import users
    from prefgen.history import PreferenceHistory
    from prefgen.mllm.model import PreferenceMLLM
    from training.evaluation.evaluate.painter import history_of

    histories = [
        PreferenceHistory.from_images(*history_of(users.user(number), 8)) for number in users.EXAMPLE_USERS.values()
    ]
    exact = [PreferenceMLLM.load(folder).encode(history) for history in histories]
    least = []
    for dtype, nf4 in ((torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)):
        mllm = PreferenceMLLM.load(folder, dtype, nf4=nf4)
        pairs = zip(map(mllm.encode, histories), exact, strict=True)
        least.append(min(float(cosine_similarity(rounded, full, dim=-1).min()) for rounded, full in pairs))
    return least


if __name__ == "__main__":
    main()
