"""Try PrefGen on this machine with your own files, and print a report to paste into an issue.

    python -m prefgen.check                                    the embedded models: does it work here at all
    python -m prefgen.check --checkpoint NAME --taste NAME     yours, with whatever adapter, MLLM and CLIP vision fit

From the pack's folder, with the Python that starts ComfyUI (the portable one for Windows wants the path in place of the
module: prefgen/check.py). Names are those that the nodes list. It paints the same
prompt and seed without and with the taste, looks whether what must be equal is equal, and leaves the two pictures in
ComfyUI's output folder. Nothing is downloaded, and nothing but the pictures is written. What stands behind `--` is
handed to ComfyUI, such as -- --lowvram.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m prefgen.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder; that in which the pack lies, if left out")
    parser.add_argument("--checkpoint", help="a file of models/checkpoints; the embedded model if left out")
    parser.add_argument("--taste", default="example: ada", help="as Apply Taste lists it")
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--mllm", default="auto")
    parser.add_argument("--clip-vision", default="auto")
    parser.add_argument("--prompt", default="a boat")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pixels", type=int, help="the picture's side; what the model is made for, if left out")
    parser.add_argument("--seed", type=int, default=0)
    words = sys.argv[1:]
    flags = words[words.index("--") + 1 :] if "--" in words else []
    args = parser.parse_args(words[: len(words) - len(flags) - ("--" in words)])
    from .comfy.entrance import enter

    enter(args.comfyui or comfyui_around(), flags)

    from .comfy.self_check import report  # ComfyUI reads its flags when it is imported

    sound, text = report(args)
    print(text)
    if not sound:
        raise SystemExit(1)


def comfyui_around() -> Path:
    """The ComfyUI that the pack lies in. SystemExit with one sentence when there is none."""
    for pack in (Path.cwd(), PACK):
        folder = pack.parent.parent
        if pack.parent.name == "custom_nodes" and (folder / "main.py").is_file():
            return folder
    raise SystemExit("PrefGen isn't inside a ComfyUI here: name its folder with --comfyui.")


if __name__ == "__main__":
    if not __package__:
        # Run by this file's path: an embedded Python looks for no module in the current folder. The folder of this file
        # has a package of the name comfy.
        sys.path[0] = str(PACK)
        # By its name below the pack, so that its relative imports work: in ComfyUI the pack has another one.
        main = import_module("prefgen.check").main
    main()
