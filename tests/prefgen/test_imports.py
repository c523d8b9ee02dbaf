"""The engine is an ordinary torch library: it imports at once, and without ComfyUI."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "prefgen").rglob("*.py")
    if "comfy" not in path.parts and path.stem != "__main__"
)


def test_nothing_of_the_engine_imports_transformers_diffusers_or_comfyui_before_it_is_needed():
    code = "import sys\n"
    code += "".join(f"import {name}\n" for name in MODULES)
    code += "print(sorted({'transformers', 'diffusers', 'tokenizers', 'comfy', 'nodes'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"
