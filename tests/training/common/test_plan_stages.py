"""What `--plan` lists: every stage in the paper's order, and memory that grows with what is read at once."""

import re

from training.common.config import plan
from training.common.config.command import load

STAGES = ["train_mllm", "extract", "probe_layers", "train_alignment", "train_user_attention"]


def sections(name):
    """{stage: its lines}, in order."""
    found = {}
    for line in plan.plan(name, load(name)).splitlines():
        if re.fullmatch(r"[a-z_.]+", line):
            found[line] = lines = []
        elif found:
            lines.append(line)
    return found


def test_a_real_base_ends_with_an_export_and_the_atelier_without():
    assert list(sections("sd15_12gb"))[-6:] == [*STAGES, "export"]
    assert list(sections("atelier"))[-5:] == STAGES


def test_longer_histories_of_the_probe_need_more_memory():
    def activations(pictures):
        config = load("sdxl_24gb", [f"probe_layers.pictures={pictures}"])
        return float(re.search(r"activations ([\d.]+)", plan._probe_layers(config, plan._reader(config))[1])[1])

    assert activations(64) > activations(4) + 0.3
