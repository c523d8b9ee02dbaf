"""What a set of simulated users costs: time, memory and disk at shares of the paper's size.

    python benchmarks/agents_scale.py                  1 % and 10 %
    python benchmarks/agents_scale.py 1 --folder DIR   all 50,153 users; DIR keeps the set (about 10 GB)

Runs the real commands and adds a row a share to docs/performance-data.json, from which a section of
docs/performance.md is written. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from performance_page import write_section

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/performance-data.json"
# The paper's agent data (arXiv 2512.06020, project page).
USERS = 50_153
PICTURES = 990_998
SAMPLE = 0.25  # seconds between two looks at the memory


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/agents_scale.py", description=__doc__.splitlines()[0])
    parser.add_argument("shares", type=float, nargs="*", default=[0.01, 0.1], help="of the paper's size, 0..1")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="keep the sets in here; otherwise they are deleted")
    args = parser.parse_args()
    for share in args.shares:
        base = args.folder or Path(tempfile.mkdtemp(prefix="agents-scale-"))
        try:
            row = measure(share, args.processes, base / f"agents-{share:g}")
        finally:
            if not args.folder:
                shutil.rmtree(base, ignore_errors=True)
        record(row)
        print(json.dumps(row, indent=1))


def measure(share: float, processes: int, folder: Path) -> dict:
    """Make one set from nothing, then check it."""
    if folder.exists():
        raise SystemExit(f"{folder} exists: a run that goes on would be measured too short.")
    users = round(USERS * share)
    pictures = round(PICTURES * share)
    options = ["--users", str(users), "--pictures", str(pictures), "--processes", str(processes)]
    load = os.getloadavg()[0]
    drawing = watched([sys.executable, "-m", "training.data.agents", str(folder), *options])
    checked = watched([sys.executable, "-m", "training.data", "check", str(folder)])
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {
        "share": share,
        "users": users,
        "pictures": pictures,
        "processes": processes,
        "command": " ".join(["python -m training.data.agents DIR", *options]),
        "seconds": round(drawing["seconds"], 1),
        "cpu_seconds": round(drawing["cpu_seconds"], 1),
        "pictures_per_second": round(pictures / drawing["seconds"], 1),
        "pictures_per_cpu_second": round(pictures / drawing["cpu_seconds"], 1),
        "peak_memory_mb": round(drawing["peak"] / 2**20),
        "output_mb": round(size / 2**20, 1),
        "check_seconds": round(checked["seconds"], 1),
        "check_cpu_seconds": round(checked["cpu_seconds"], 1),
        "check_peak_memory_mb": round(checked["peak"] / 2**20),
        "milliseconds_a_picture": profile(),
        "load_before": round(load, 2),
        "nice": os.nice(0),
        "machine": machine(),
    }


def watched(line: list[str]) -> dict:
    """Run a command to its end: seconds, CPU seconds (with its workers) and peak memory of all its processes, bytes."""
    start = time.monotonic()
    peak = 0
    process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        peak = max(peak, sum(map(memory, descendants(process.pid))))
        time.sleep(SAMPLE)
    if status:
        raise SystemExit(f"{' '.join(line)} failed")
    return {"seconds": time.monotonic() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": peak}


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    processes = [pid]
    for parent in processes:
        try:
            processes += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
        except OSError:
            pass  # it has just ended
    return processes


def memory(pid: int) -> int:
    """Resident bytes of a process; pages that processes share are divided among them (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def profile(users: int = 15) -> dict[str, float]:
    """CPU milliseconds of this process that each step of one picture takes, over about 300 pictures."""
    sys.path.insert(0, str(ROOT))
    from PIL import Image

    from prefgen.atelier.renderer import render
    from training.data.agents import people, renderers, vocabulary

    words = vocabulary.atelier()
    spent = {"decide": 0.0, "draw": 0.0, "encode": 0.0}
    pictures = 0
    for user in range(-1, users):  # the first round only fills caches
        if user == 0:
            spent = dict.fromkeys(spent, 0.0)
            pictures = 0
        clock = [time.process_time()]
        items = people.items(words, people.agent(words, 0, max(user, 0)), 0, range(20))
        clock.append(time.process_time())
        drawn = [render(renderers.scene(words, item), 128) for item in items]
        clock.append(time.process_time())
        for picture in drawn:
            renderers.encode(Image.fromarray(picture))
        clock.append(time.process_time())
        for step, begin, end in zip(spent, clock, clock[1:], strict=False):
            spent[step] += end - begin
        pictures += len(items)
    return {step: round(1000 * seconds / pictures, 2) for step, seconds in spent.items()}


def machine() -> str:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = model[0].split(": ", 1)[1] if model else platform.machine()
    return f"{os.cpu_count()} cores, {name}; Python {platform.python_version()}"


def record(row: dict) -> None:
    """Add or replace a row, then write the page anew."""
    rows = json.loads(RECORD.read_text())["agents"] if RECORD.exists() else []
    rows = [r for r in rows if (r["share"], r["processes"]) != (row["share"], row["processes"])] + [row]
    rows.sort(key=lambda r: (r["share"], r["processes"]))
    RECORD.write_text(json.dumps({"agents": rows}, indent=1) + "\n")
    write_section("Simulated users", page(rows))


def page(rows: list[dict]) -> list[str]:
    lines = [
        "`python benchmarks/agents_scale.py`, record: `performance-data.json`. The atelier's renderer, 128 px.",
        f"Share 1 is the paper's size: {USERS:,} users, {PICTURES:,} pictures.",
        "",
        "| share | pictures | processes | seconds | CPU s | pictures/s | pictures/CPU s | peak memory, MB | size, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rates = (
            f"{r['pictures_per_second']} | {r['pictures_per_cpu_second']} | {r['peak_memory_mb']} | {r['output_mb']}"
        )
        times = f"{r['processes']} | {r['seconds']} | {r['cpu_seconds']}"
        lines.append(f"| {r['share']:.3g} | {r['pictures']:,} | {times} | {rates} |")
    lines += ["", "Then `python -m training.data check DIR`:", ""]
    lines += ["| share | seconds | CPU s | peak memory, MB |", "|---|---|---|---|"]
    checks = ("check_seconds", "check_cpu_seconds", "check_peak_memory_mb")
    lines += [f"| {r['share']:.3g} | {' | '.join(str(r[k]) for k in checks)} |" for r in rows]
    lines += ["", "Peak memory is the sum over all processes, shared pages counted once. How each was run:", ""]
    for r in rows:
        lines.append(f"- {r['share']:.3g}: `{r['command']}`;")
        lines.append(f"  {r['machine']}; load average before the start {r['load_before']}, niceness {r['nice']}.")
        steps = ", ".join(f"{step} {spent}" for step, spent in r["milliseconds_a_picture"].items())
        lines.append(f"  CPU milliseconds a picture in one process: {steps}.")
    return lines


if __name__ == "__main__":
    main()
