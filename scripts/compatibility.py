"""Run the tests of everything that touches ComfyUI on several versions of it, beside the real packs of others, and
write the table in docs/compatibility.md.

    python -m scripts.compatibility --packs FOLDER TREE[=PYTHON] ...

TREE: a ComfyUI folder. PYTHON: the interpreter of an environment with its requirements and those of the tests; this one
if left out. FOLDER: holds checkouts of the packs in PACKS. A version takes about as long as half of `make test`; every
one is written into the table as soon as it is done. CI runs the pinned ComfyUI alone, without packs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from .setup_env import ROOT, comfyui_version

PACKS = (
    "ComfyUI_IPAdapter_plus",
    "ComfyUI_InstantID",
    "PuLID_ComfyUI",
    "ComfyUI-TiledDiffusion",
    "ComfyUI-ppm",
    "ComfyUI-IPAdapter-Flux",
    "ComfyUI-GGUF",
)
TESTS = ("tests/prefgen/comfy", "tests/scripts/test_workflows.py", "tests/scripts/test_comfy_server.py")
PAGE = ROOT / "docs/compatibility.md"
RECORD = ROOT / "docs/compatibility.json"
BEGIN, END = "<!-- written by scripts/compatibility.py -->", "<!-- end -->"
LIBRARIES = ("torch", "transformers", "diffusers", "comfyui-frontend-package")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", metavar="TREE[=PYTHON]")
    parser.add_argument("--packs", type=Path, required=True, help="a folder with checkouts of the other packs")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders of tests; all of them if left out")
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="of them, those that pytest's -m chooses")
    args = parser.parse_args()
    missing = [name for name in PACKS if not (args.packs / name).is_dir()]
    if missing:
        raise SystemExit(f"{args.packs} has no {', '.join(missing)}: clone them there.")
    failed = False
    for words in args.trees:
        tree, _, python = words.partition("=")
        if comfyui_version(Path(tree)) is None:
            raise SystemExit(f"{tree} holds no ComfyUI: name the folder with main.py.")
        row = row_of(Path(tree), python or sys.executable, args.packs, args.tests, args.only)
        rows = merged(json.loads(RECORD.read_text()) if RECORD.exists() else [], row)
        RECORD.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(with_table(PAGE.read_text(), table(rows)))
        print(table([row]), flush=True)
        failed |= bool(row["failed"])
    return int(failed)


def row_of(tree: Path, python: str, packs: Path, tests: Iterable[str], only: str) -> dict:
    """What the tests say of one ComfyUI."""
    environment = os.environ | {"COMFYUI_PATH": str(tree.resolve()), "PREFGEN_NEIGHBOURS": str(packs.resolve())}
    environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        line = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *tests]
        subprocess.run(line + (["-m", only] if only else []), cwd=ROOT, env=environment, check=False)
        if not report.exists():
            raise SystemExit(f"The tests did not start on {tree}; see the lines above.")
        counts = counted(report.read_text())
    return {
        "comfyui": comfyui_version(tree),
        "python": said(python, "import platform; print(platform.python_version())"),
        "libraries": {name: said(python, VERSION.format(name)) for name in LIBRARIES},
        "packs": {name: pack_version(packs / name) for name in PACKS},
        "tests": list(tests),
        "only": only,
        **counts,
    }


VERSION = "from importlib.metadata import version; print(version({!r}))"


def said(python: str, code: str) -> str:
    """What one line of Python prints in an environment."""
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def pack_version(folder: Path) -> str:
    """The version that a pack's pyproject.toml says."""
    text = (folder / "pyproject.toml").read_text() if (folder / "pyproject.toml").exists() else ""
    version = re.search(r'^version\s*=\s*"(.+?)"', text, re.M)
    return version.group(1) if version else ""


def counted(report: str) -> dict:
    """{"passed": n, "skipped": {reason: n}, "failed": [names]} of pytest's JUnit report."""
    result: dict = {"passed": 0, "skipped": {}, "failed": []}
    for case in ElementTree.fromstring(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result["failed"].append(f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}")
        elif skipped is not None:
            reason = skipped.get("message", "")
            result["skipped"][reason] = result["skipped"].get(reason, 0) + 1
        else:
            result["passed"] += 1
    return result


def merged(rows: list[dict], row: dict) -> list[dict]:
    """The rows with one more, in place of that of the same ComfyUI, oldest ComfyUI first."""
    others = [other for other in rows if other["comfyui"] != row["comfyui"]]
    return sorted([*others, row], key=lambda each: [int(part) for part in each["comfyui"].split(".")])


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| ComfyUI | front end | transformers | tests | passed | skipped | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = ", ".join(f"`{Path(name).name}`" for name in row["tests"])
        tests = names + (f" ({row['only']})" if row["only"] else "")
        skipped = "; ".join(f"{n}: {reason}" for reason, n in row["skipped"].items()) or "0"
        failed = ", ".join(f"`{name}`" for name in row["failed"]) or "0"
        libraries = row["libraries"]
        lines.append(
            f"| {row['comfyui']} | {libraries['comfyui-frontend-package']} | {libraries['transformers']} | {tests} | "
            f"{row['passed']} | {skipped} | {failed} |"
        )
    return "\n".join(lines)


def with_table(page: str, written: str) -> str:
    """A page with the table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{PAGE.name} has no place for the table: {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{written}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
