"""Run the tests of numbers as on other CPUs, one variant after another; prints a line for each.

    python scripts/any_cpu.py [--only NAME] [pytest's own words, such as tests/prefgen or -k tiles]

The first variants hold the libraries to what an older CPU can do, or to another number of threads. The last ones,
`rounded 1` to `rounded 3`, add rounding errors to every product, norm and function (tests/perturb.py): they stand for
CPUs that nobody has at hand, and find what agrees by chance. Exit status 1 if any variant fails.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# name: (environment, words for pytest)
VARIANTS = {
    "own, 1 thread": ({"OMP_NUM_THREADS": "1"}, []),
    "own, 2 threads": ({"OMP_NUM_THREADS": "2"}, []),
    "ATen without vectors": ({"ATEN_CPU_CAPABILITY": "default"}, []),
    "ATen AVX2": ({"ATEN_CPU_CAPABILITY": "avx2"}, []),
    "oneDNN AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, []),
    "oneDNN SSE4.1": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, []),
    "without oneDNN": ({}, ["--no-onednn"]),
    "MKL AVX2": ({"MKL_ENABLE_INSTRUCTIONS": "AVX2", "MKL_CBWR": "COMPATIBLE"}, []),
    **{f"rounded {seed}": ({}, ["--perturb", str(seed)]) for seed in (1, 2, 3)},
}


def run(name: str, words: list[str]) -> bool:
    """One variant; whether it passed. Prints its line, and what failed below it."""
    environment, options = VARIANTS[name]
    line = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m", "numbers and not slow", *options, *words]
    start = time.monotonic()
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | environment
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [text for text in done.stdout.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", text)]
    summary = lines[-1] if lines else done.stderr
    counts = re.sub(r" in [\d.]+s.*", "", summary.strip("= "))
    print(f"{name:22} {counts}, {time.monotonic() - start:.0f} s", flush=True)
    for failure in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE):
        print(f"    {failure}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=VARIANTS, help="one variant, or several by several --only")
    options, words = parser.parse_known_args()
    passed = [run(name, words) for name in options.only or VARIANTS]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
