"""`make demo`: likes and dislikes in, pictures to that taste out, through a real ComfyUI, measured.

For users and prompts that no training stage saw, four pictures each from the same seed: without preference (`none`),
with the user's own (`prefgen`), with another user's (`mismatched`), and without, but with the user's true taste written
into the prompt (`oracle`, the ceiling). All come out of workflows/prefgen_atelier.json over ComfyUI's HTTP API; the
histories are PNG files that the graph's own node reads. The judge, which never saw a generated picture, reads the saved
files.

Leaves output/demo/sheet.png, output/demo/report.json, the pictures in output/demo/pictures, and pictures.jsonl, the
table of them that `training.evaluation.study` reads.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from prefgen.files import write_atomic
from prefgen.pictures import read_picture
from scripts import demo_sheet
from scripts.comfy_server import ROOT, ComfyClient, ComfyServer, GraphError, ServerError, exit_on_terminate, remove_base
from scripts.demo_worlds import DemoWorld, demo_world
from scripts.graph import find, load, only, to_api
from scripts.setup_env import SetupError, find_comfyui
from training.common.files import save_image
from training.common.statistics import bootstrap

WORKFLOW = ROOT / "workflows" / "prefgen_atelier.json"
PROMPT_TITLE = "Prompt"
PLAIN_TITLE = "Save without preference"
USER_TITLE = "Save with preference"
# What each picture is painted with: nothing, the next user's history, the user's own, and the likes in the prompt.
CONDITIONS = ("none", "mismatched", "prefgen", "oracle")
SHEET_USERS = 3
SHEET_PROMPTS = 3


def main(arguments: list[str] | None = None) -> dict:
    """Run the demo, print its figures and return its report."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parsed(words)
    exit_on_terminate()
    started = time.monotonic()
    comfyui = find_comfyui()
    world = demo_world()
    people = world.people(options.users)
    prompts = spread(world.prompts(), options.prompts)
    options.out.mkdir(parents=True, exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="prefgen-demo-"))
    fresh = Path(tempfile.mkdtemp(prefix=".pictures-", dir=options.out))
    try:
        print(f"{len(people)} unseen users, {len(prompts)} unseen prompts: rendering histories, starting ComfyUI ...")
        shown = write_histories(base / "input" / "prefgen", world, people)
        with ComfyServer(comfyui, base, threads=options.threads) as server, server.client() as client:
            template = to_api(load(WORKFLOW), client.object_info())
            jobs = plan(template, world, people, prompts, options.seed, options.steps)
            pictures = make_pictures(client, jobs, fresh)
        report = {
            "users": len(people),
            "prompts": len(prompts),
            "seconds": 0.0,
            **measure(pictures, world, people, prompts),
            "seeds": sorted({job.seed for job in jobs}),
            "command": "make demo" + (f" ARGS={shlex.quote(shlex.join(words))}" if words else ""),
        }
        save_image(
            draw_sheet(world, people, shown, prompts, pictures, report), options.out / "sheet.png", optimize=True
        )
        report["seconds"] = round(time.monotonic() - started, 1)
        write_atomic(options.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        shutil.copytree(base / "input" / "prefgen", fresh / "histories")
        table = study_table(jobs, [world.text(prompt) for prompt in prompts], fresh / "histories")
        # Only now do the pictures of an earlier run go: a stopped demo leaves them as they were.
        shutil.rmtree(options.out / "pictures", ignore_errors=True)
        fresh.rename(options.out / "pictures")
        write_atomic(options.out / "pictures.jsonl", table.encode())
    finally:
        remove_base(base)
        shutil.rmtree(fresh, ignore_errors=True)
    say(report, options.out)
    return report


@dataclass(frozen=True)
class Job:
    """One picture to make: which user, which prompt, which condition, and the graph that makes it."""

    user: int
    prompt: int
    condition: str
    seed: int
    graph: dict

    @property
    def prefix(self) -> str:
        """Where the picture lies below `pictures/`, without its suffix."""
        return f"user{self.user:02d}/prompt{self.prompt:02d}_{self.condition}"


def history_name(user: int) -> str:
    return f"demo_user_{user:02d}"


def spread(items: list, count: int) -> list:
    """`count` of `items`, evenly spread, so that subjects differ. All of them if there are fewer."""
    return [items[index * len(items) // count] for index in range(count)] if count < len(items) else list(items)


def write_histories(folder: Path, world: DemoWorld, people: list) -> list[tuple[list[Image.Image], list[Image.Image]]]:
    """Render every user's history to `folder`/<name>/{liked,disliked}/NN.png, as an artist would lay pictures down.

    Returns the (liked, disliked) pictures of each user.
    """
    shown = []
    for index, person in enumerate(people):
        pictures = {"liked": [], "disliked": []}
        for picture, liked in world.history(person):
            pictures["liked" if liked else "disliked"].append(Image.fromarray(picture))
        for verdict, images in pictures.items():
            target = folder / history_name(index) / verdict
            target.mkdir(parents=True)
            for number, picture in enumerate(images):
                picture.save(target / f"{number:02d}.png")
        shown.append((pictures["liked"], pictures["disliked"]))
    return shown


def study_table(jobs: list[Job], prompts: list[str], histories: Path) -> str:
    """pictures.jsonl: the histories' pictures with their verdicts, then the painted ones with what made them."""
    rows = [
        {"user": file.parts[0], "verdict": file.parts[1], "image": f"pictures/histories/{file.as_posix()}"}
        for file in (path.relative_to(histories) for path in sorted(histories.glob("*/*/*.png")))
    ]
    rows += [
        {
            "user": history_name(job.user),
            "prompt": prompts[job.prompt],
            "method": job.condition,
            "image": f"pictures/{job.prefix}.png",
        }
        for job in jobs
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def seed_of(base: int, user: int, prompt: int) -> int:
    """The seed of a user and a prompt. The users on the sheet share one seed a prompt, so that their rows compare;
    every other pair has its own, so that the means rest on many different pictures."""
    return base + 1000 * prompt + (0 if user < SHEET_USERS else user)


def fill(
    template: dict, *, text: str, seed: int, prefix: str, side: int, steps: int | None, history: str | None
) -> dict:
    """The template with a prompt, a seed and the side of its pictures filled in, cut down to one branch: the one with a
    user if `history` names an entry of Load Preference History, else the plain one."""
    output = find(template, "SaveImage", PLAIN_TITLE if history is None else USER_TITLE)
    graph = only(template, [output])
    graph[find(graph, "CLIPTextEncode", PROMPT_TITLE)]["inputs"]["text"] = text
    graph[output]["inputs"]["filename_prefix"] = prefix
    graph[find(graph, "EmptyLatentImage")]["inputs"] |= {"width": side, "height": side}
    sampler = graph[find(graph, "KSampler")]["inputs"]
    sampler["seed"] = seed
    if steps:
        sampler["steps"] = steps
    if history is not None:
        graph[find(graph, "PrefGen_LoadPreferenceHistory")]["inputs"]["history"] = history
    return graph


def plan(template: dict, world: DemoWorld, people: list, prompts: list, seed: int, steps: int | None) -> list[Job]:
    """Every picture of the demo, in an order in which what one graph computed serves the next."""
    jobs = []
    for user, person in enumerate(people):
        other = (user + 1) % len(people)
        for prompt, asked in enumerate(prompts):
            texts = dict.fromkeys(CONDITIONS, world.text(asked))
            texts["oracle"] = world.enriched(person, asked)
            histories = {"prefgen": history_name(user), "mismatched": history_name(other)}
            for condition in CONDITIONS:
                job = Job(user, prompt, condition, seed_of(seed, user, prompt), {})
                graph = fill(
                    template,
                    text=texts[condition],
                    seed=job.seed,
                    prefix=job.prefix,
                    side=world.side,
                    steps=steps,
                    history=histories.get(condition),
                )
                jobs.append(Job(user, prompt, condition, job.seed, graph))
    return sorted(jobs, key=lambda job: (job.user, CONDITIONS.index(job.condition), job.prompt))


def make_pictures(client: ComfyClient, jobs: list[Job], target: Path) -> dict[tuple[int, int, str], np.ndarray]:
    """Queue all jobs ahead, follow them, and save each picture under `target`.

    Returns {(user, prompt, condition): uint8 [H, W, 3]}. Raises GraphError with the sentence of the node that failed.
    """
    pictures = {}
    queued = [(job, client.queue(job.graph)) for job in jobs]
    with tqdm(queued, desc="pictures", unit="picture", dynamic_ncols=True) as bar:
        for job, prompt_id in bar:
            bar.set_postfix_str(f"user {job.user + 1}, {job.condition}", refresh=False)
            client.wait(prompt_id)
            (saved,) = client.pictures(prompt_id).values()
            data = client.picture(saved[0])
            path = target / f"{job.prefix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            pictures[job.user, job.prompt, job.condition] = read_picture(data, long_side=None)
    return pictures


def summary(values: np.ndarray) -> dict:
    """{"mean", "ci95", "n"} of one number a picture, `values` [users, prompts]."""
    return {"mean": round(float(values.mean()), 4), "ci95": bootstrap(values.mean(1)), "n": int(values.size)}


def measure(pictures: dict, world: DemoWorld, people: list, prompts: list) -> dict:
    """Let the judge read every picture and sum up: alignment, its differences, and how often the subject is there."""
    keys = list(pictures)
    asked = [(people[user], prompts[prompt]) for user, prompt, _ in keys]
    readings = world.read([pictures[key] for key in keys], asked)
    shape = (len(people), len(prompts))
    alignment = {condition: np.zeros(shape) for condition in CONDITIONS}
    subject = {condition: np.zeros(shape) for condition in CONDITIONS}
    for (user, prompt, condition), (aligned, named) in zip(keys, readings, strict=True):
        alignment[condition][user, prompt] = aligned
        subject[condition][user, prompt] = named
    gain = alignment["prefgen"].mean() - alignment["none"].mean()
    ceiling = alignment["oracle"].mean() - alignment["none"].mean()
    return {
        "alignment": {condition: summary(alignment[condition]) for condition in CONDITIONS},
        "differences": {
            f"{a} - {b}": summary(alignment[a] - alignment[b])
            for a, b in (("prefgen", "none"), ("prefgen", "mismatched"), ("mismatched", "none"), ("oracle", "none"))
        },
        "gain_share": round(float(gain / ceiling), 4) if ceiling > 0 else None,
        "subject_accuracy": {condition: summary(subject[condition]) for condition in CONDITIONS},
    }


def draw_sheet(world: DemoWorld, people: list, shown: list, prompts: list, pictures: dict, report: dict) -> Image.Image:
    """The sheet of the first users and prompts."""
    blocks = []
    for index, person in enumerate(people[:SHEET_USERS]):
        rows = [
            demo_sheet.SheetRow(
                world.text(prompts[prompt]),
                *(Image.fromarray(pictures[index, prompt, name]) for name in ("none", "prefgen", "mismatched")),
            )
            for prompt in range(min(SHEET_PROMPTS, len(prompts)))
        ]
        liked, disliked = shown[index]
        likes, dislikes = world.opinions(person)
        blocks.append(
            demo_sheet.SheetUser(
                name=world.names.get(person.id, f"User {index + 1}"),
                likes=likes,
                dislikes=dislikes,
                liked=liked,
                disliked=disliked,
                rows=rows,
            )
        )
    numbers = report["alignment"]
    described = (
        ("none", "without"),
        ("mismatched", "another user's"),
        ("prefgen", "with"),
        ("oracle", "taste in the prompt"),
    )
    footer = [
        "Alignment, as the judge sees it: "
        + ",  ".join(f"{words} {numbers[name]['mean']:.2f}" for name, words in described)
        + f"   ({numbers['prefgen']['n']} pictures each)",
        world.meaning,
    ]
    return demo_sheet.draw_sheet(
        blocks,
        "The same prompt, leaning to each user's taste",
        "Users and prompts that no training stage saw. In a row, every picture has the same prompt and the same seed.",
        footer,
    )


def say(report: dict, out: Path) -> None:
    """Print the numbers and where the files lie."""
    print()
    for condition in CONDITIONS:
        entry = report["alignment"][condition]
        subject = report["subject_accuracy"][condition]
        low, high = entry["ci95"]
        print(
            f"  {condition:<11} alignment {entry['mean']:+.3f}  [{low:+.3f}, {high:+.3f}]"
            f"   subject seen {subject['mean']:.0%}   n {entry['n']}"
        )
    print(f"  gain share (prefgen - none) / (oracle - none): {report['gain_share']}")
    print(f"  {report['seconds']:.0f} s;  {out / 'sheet.png'}  {out / 'report.json'}")


def parsed(words: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(prog="make demo", description="Measure PrefGen end to end (options in ARGS=...)")
    parser.add_argument("--users", type=int, default=18, help="how many unseen users (default: 18)")
    parser.add_argument("--prompts", type=int, default=4, help="how many unseen prompts each (default: 4)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: what the graph says)")
    parser.add_argument("--seed", type=int, default=20_000, help="first seed (default: 20000)")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo", help="where sheet and report go")
    parser.add_argument("--threads", type=int, help="CPU threads for the server (default: torch's own choice)")
    options = parser.parse_args(words)
    if options.users < 2 or options.prompts < 1:
        parser.error("at least 2 users (one user's preference is tried on the other) and 1 prompt are needed")
    return options


if __name__ == "__main__":
    try:
        main()
    except (SetupError, ServerError, GraphError, TimeoutError, ValueError) as error:
        sys.exit(f"The demo stopped: {error}")
    except KeyboardInterrupt:
        sys.exit("The demo is stopped, and so is the ComfyUI it started.")
