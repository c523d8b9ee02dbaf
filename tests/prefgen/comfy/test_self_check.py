"""`python -m prefgen.check`: what an artist pastes into an issue."""

import argparse
import subprocess
import sys

import pytest

from scripts.comfy_server import ROOT
from scripts.setup_env import find_comfyui


@pytest.mark.slow
def test_the_command_paints_with_the_embedded_models_and_says_that_all_is_well(tmp_path):
    line = [sys.executable, "prefgen/check.py", "--comfyui", str(find_comfyui()), "--steps", "1"]
    flags = ["--", "--cpu", "--output-directory", str(tmp_path)]
    ran = subprocess.run([*line, *flags], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    assert "### PrefGen check" in ran.stdout and "- device: cpu" in ran.stdout and "All is well." in ran.stdout
    assert "- [ ]" not in ran.stdout and ran.stdout.count("- [x]") == 5
    assert {path.name for path in (tmp_path / "prefgen-check").iterdir()} == {"with.png", "without.png"}


def test_what_stops_it_stands_in_the_report(pack):
    args = argparse.Namespace(checkpoint="gone.safetensors", pixels=None)
    sound, text = pack("prefgen.comfy.self_check").report(args)
    assert not sound and "- [ ] it ran to the end" in text and "gone.safetensors" in text.split("stopped: ")[1]
    assert "Something is wrong: paste this report into an issue." in text


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_that_is_no_comfyui_is_named(monkeypatch, folder):
    from prefgen import check

    monkeypatch.setattr(sys, "argv", ["check", "--comfyui", folder])
    with pytest.raises(SystemExit, match="holds no ComfyUI"):
        check.main()
