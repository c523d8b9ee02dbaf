"""The second edition with random weights and a few users, for tests of what comes after its base models.

`python -m tests.training.tiny_world FOLDER "STAGE WORDS"...` runs stages there in one process, each with its words in
one argument; PREFGEN_ATELIER_WEIGHTS has to be FOLDER/weights.
"""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USERS = 12
# Pictures of an album, fewer than people have: drawing them is most of what the tests take.
ALBUM = FEW_LIKES = (6, 5)


def run(folder, *stages):
    """Run stages ("train_mllm --set ...") in one process beside a folder's weights; its output."""
    environment = os.environ | {"PREFGEN_ATELIER_WEIGHTS": str(folder / "weights"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "tests.training.tiny_world", str(folder), *stages]
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def write_weights(folder):
    """Random weights of every base model, and the marks of the stages that make them."""
    import torch
    from transformers import SmolVLMForConditionalGeneration

    from prefgen.atelier import models
    from prefgen.atelier.world.judge import WIDTHS, Judge
    from training.common.files import save_weights
    from training.data.trait_tokens import TraitTokens

    torch.manual_seed(0)
    unet = models.load_unet_diffusers(random=True)
    save_weights(unet.state_dict(), models.WEIGHTS / "unet.safetensors")
    save_weights(TraitTokens(unet.config.cross_attention_dim).state_dict(), models.WEIGHTS / "trait_tokens.safetensors")
    save_weights(models.load_vae_diffusers(random=True).state_dict(), models.WEIGHTS / "vae.safetensors")
    save_weights(models.load_clip(random=True).state_dict(), models.WEIGHTS / "clip.safetensors")
    for which, width in WIDTHS.items():
        save_weights(Judge(width).state_dict(), models.WEIGHTS / f"judge_{which}.safetensors")
    mllm = SmolVLMForConditionalGeneration(models.mllm_config())
    mllm.config.architectures = ["SmolVLMForConditionalGeneration"]
    (models.MLLM_FOLDER / "config.json").write_text(mllm.config.to_json_string(use_diff=True))
    state = {key: value for key, value in mllm.state_dict().items() if key != "lm_head.weight"}
    save_weights(state, models.MLLM_FOLDER / "model.safetensors", {"format": "pt"})
    done = folder / "runs/atelier.world.captioning/done"
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({}))


def write_people(folder):
    """The data set of a few users with small albums."""
    from training.atelier.world import people

    people.ALBUM = ALBUM
    people.FEW_LIKES = FEW_LIKES
    people.make(people.People(USERS, 1), folder, processes=1)


def look_quickly():
    """Paint in two steps, and measure a judge's errors on a few renders."""
    from training.evaluation.world import measures, painter, readings

    painter.STEPS = 2
    readings.RENDERS = 4
    measures.DRAWS = 20


def main():
    folder = Path(sys.argv[1])
    for stage in sys.argv[2:]:
        name, *words = shlex.split(stage)
        if name == "weights":
            write_weights(folder)
            continue
        if name == "people":
            write_people(folder / "people")
            continue
        sys.argv = [name, *words]
        if name == "evaluation.world":
            look_quickly()
        runpy.run_module(f"training.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
