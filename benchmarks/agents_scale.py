"""What a set of simulated users costs: time, memory and disk at shares of the paper's size.

    python benchmarks/agents_scale.py                  1 % and 10 %
    python benchmarks/agents_scale.py 1 --folder DIR   all 50,153 users; DIR keeps the set (about 10 GB)

Runs the real commands and adds a row a share to docs/performance-data.json, from which a section of
docs/performance.md is written. Needs Linux (/proc).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from processes import watched
from records import machine, parser_of, publish

from training.evaluation.tables import table

# The paper's agent data (arXiv 2512.06020, project page).
USERS = 50_153
PICTURES = 990_998


def main() -> None:
    parser = parser_of(__file__, __doc__)
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
        same = ("share", "processes")
        publish(args.out, "performance-data.json", row | {"note": args.note}, same, "Simulated users", page, "agents")


def measure(share: float, processes: int, folder: Path) -> dict:
    """Make one set from nothing, then check it."""
    if folder.exists():
        raise SystemExit(f"{folder} exists: a run that goes on would be measured too short.")
    users = round(USERS * share)
    pictures = round(PICTURES * share)
    options = ["--users", str(users), "--pictures", str(pictures), "--processes", str(processes)]
    load = os.getloadavg()[0]
    maker = watched([sys.executable, "-m", "training.data.agents", str(folder), *options])
    check = watched([sys.executable, "-m", "training.data", "check", str(folder)])
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {
        "share": share,
        "users": users,
        "pictures": pictures,
        "processes": processes,
        "command": " ".join(["python -m training.data.agents DIR", *options]),
        "seconds": round(maker["seconds"], 1),
        "cpu_seconds": round(maker["cpu_seconds"], 1),
        "pictures_per_second": round(pictures / maker["seconds"], 1),
        "pictures_per_cpu_second": round(pictures / maker["cpu_seconds"], 1),
        "peak_memory_mb": round(maker["peak"] / 2**20),
        "output_mb": round(size / 2**20, 1),
        "check_seconds": round(check["seconds"], 1),
        "check_cpu_seconds": round(check["cpu_seconds"], 1),
        "check_peak_memory_mb": round(check["peak"] / 2**20),
        "milliseconds_a_picture": profile(),
        "load_before": round(load, 2),
        "nice": os.nice(0),
        "machine": machine(),
    }


def profile(users: int = 15) -> dict[str, float]:
    """CPU milliseconds of this process that each step of one picture takes, over about 300 pictures."""
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
        # 20 pictures each, as the users of the paper's size have in the mean.
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


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    sizes = ("seconds", "cpu_seconds", "pictures_per_second", "pictures_per_cpu_second", "peak_memory_mb", "output_mb")
    sets = table(
        ["share", "pictures", "processes", "seconds", "CPU s", "pictures/s", "pictures/CPU s", "peak memory, MB"]
        + ["size, MB"],
        [[f"{r['share']:.3g}", f"{r['pictures']:,}", r["processes"], *(str(r[k]) for k in sizes)] for r in rows],
    )
    checks = ("check_seconds", "check_cpu_seconds", "check_peak_memory_mb")
    checked = table(
        ["share", "seconds", "CPU s", "peak memory, MB"],
        [[f"{r['share']:.3g}", *(str(r[k]) for k in checks)] for r in rows],
    )
    return f"""`python benchmarks/agents_scale.py`, record: `performance-data.json`. The atelier's renderer, 128 px.
Share 1 is the paper's size: {USERS:,} users, {PICTURES:,} pictures.

{sets}

Then `python -m training.data check DIR`:

{checked}

Peak memory is the sum over all processes, shared pages counted once. How each was run:

""" + "\n".join(map(how_it_was_run, rows))


def how_it_was_run(row: dict) -> str:
    steps = ", ".join(f"{step} {spent}" for step, spent in row["milliseconds_a_picture"].items())
    return f"""- {row["share"]:.3g}: `{row["command"]}`;
  {row["machine"]}; load average before the start {row["load_before"]}, niceness {row["nice"]}.
  CPU milliseconds a picture in one process: {steps}."""


if __name__ == "__main__":
    main()
