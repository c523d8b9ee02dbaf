"""Stage 10: which layers know the user.

    python -m training.probe_layers --config atelier

Every decoder layer's last token, probed on users held out from the probes:
- inter-user, whose history is this: `same_user` (retrieval) and `named` (linear probe), over several histories of each
  user that share no picture and no prompt;
- intra-user, liked or disliked: `liked_first`. The MLLM reads a history, then one more picture without a verdict and
  the question whether the user would like it; a linear probe fitted on other users must put a liked picture above a
  disliked one of the same user. A verdict in the text would be read off by any layer, and the attributes of a taste
  are known in simulated worlds only, so this is the task that stays sound everywhere;
- `traits`, where the world knows its attributes: a linear probe names what is liked.
Prompts are left out: they would give a real user away.

Controls: shuffled labels; `colour`, the mean colour and the colour histogram of the same pictures, liked and disliked
apart; `embedding`, the decoder's input: mean image tokens of the liked and of the disliked pictures, and for
`liked_first` the asked picture's (the last token's own embedding is one word for all). A linear probe can't compare a
picture with a history, so for `liked_first` colour is given the products of both, and the row `compared` gives them to
the embedding. For `liked_first` also `stranger`, the same pictures after another user's history.

Three groups of users: the probes are fitted on the first (training split), the layers are chosen on the second
(training split), the figures come from the third (test split). The rule: e_core is the middle-to-upper layer with the
best mean of `same_user` and `named`; e_sem the uppermost four neighbouring layers whose mean `liked_first` can't be
told from that of the best four (the 95 % interval of their difference, over users, holds zero), so the paper's top four
unless the probe speaks against them.

Writes `layers.json`, `probes.md` and `layers.png`. Pieces of what was read are kept: a stopped stage goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from prefgen.atelier.models import MLLM_FOLDER
from prefgen.files import write_atomic
from prefgen.mllm.model import PreferenceMLLM

from .common.config.command import StageArgs, arguments
from .common.config.schema import ProbeLayers
from .common.errors import exit_with_message
from .common.files import save_weights
from .common.run import Run
from .common.statistics import bootstrap, resampled
from .data.atelier_users import interleaved
from .data.errors import DataError
from .data.preference_questions import WOULD
from .data.readers import Conversation, Reader, load_reader, picture_tokens
from .data.schema import normal_prompt
from .data.worlds import History, World, open_world
from .evaluation import probes
from .evaluation.probe_page import MEASURES, draw, page

PIECE = 16  # users in a file of readings
GROUPS = ("fit", "choose", "report")
SEM_LAYERS = 4


@dataclass(frozen=True)
class Dealt:
    """One history: numbers of its pictures, and a liked and a disliked one that it does not hold."""

    liked: list[int]
    disliked: list[int]
    asked: tuple[int, int]


def deal(world: World, user: int, histories: int, pictures: int, seed: int) -> list[Dealt] | None:
    """Several histories of a user, at most `pictures` of each verdict; no picture and no prompt stands in two, nor
    an asked picture's prompt in its own history. None for a user with too few pictures."""
    rng = np.random.default_rng([seed, user])
    wanted = histories * (pictures + 1)
    drawn = world.history(user, rng, wanted, wanted)
    by_prompt: dict[object, list[tuple[int, bool]]] = defaultdict(list)
    for number, liked, prompt in zip(drawn.pictures.tolist(), drawn.liked.tolist(), drawn.prompts, strict=True):
        by_prompt[normal_prompt(prompt) or number].append((number, liked))
    groups = list(by_prompt.values())
    groups = [groups[i] for i in rng.permutation(len(groups))]
    groups.sort(key=lambda group: (sum(liked for _, liked in group), len(group)))
    dealt = []
    for k in range(histories):
        # The liked picture that is asked about, and the disliked one of its prompt, or any other.
        mine = groups[k::histories]
        first = next((g for g in reversed(mine) if any(liked for _, liked in g)), [])
        twin = first if any(not liked for _, liked in first) else None
        second = twin or next((g for g in mine if any(not liked for _, liked in g)), [])
        rest = [picture for group in mine if group is not first and group is not second for picture in group]
        good, bad = [n for n, liked in first if liked], [n for n, liked in second if not liked]
        liked, disliked = ([n for n, verdict in rest if verdict == side][:pictures] for side in (True, False))
        if not (good and bad and liked and disliked):
            return None
        dealt.append(Dealt(liked, disliked, (good[0], bad[0])))
    return dealt


def mllm_of(args: StageArgs[ProbeLayers], world: World) -> PreferenceMLLM:
    """The tuned MLLM. The pictures are read anew, so the atelier needs no cache of image tokens."""
    return PreferenceMLLM.load(MLLM_FOLDER) if args.config.mllm.path is None else load_reader(args, world).mllm


@torch.inference_mode()
def read_user(mllm: PreferenceMLLM, world: World, dealt: list[Dealt], others: list[Dealt] | None) -> dict:
    """One user's tensors, k histories: `history` [k, layers, D]; `asked` [k, 2, layers, D], with the liked and with the
    disliked picture; `embedding` and `colour` [k, 4, .] of the liked, the disliked, and the two asked pictures; with
    the dealt histories of another user also `stranger` [k, 2, layers, D]."""
    numbers = sorted({n for d in (*dealt, *(others or [])) for n in (*d.liked, *d.disliked, *d.asked)})
    pictures, place = world.pictures(numbers), {number: i for i, number in enumerate(numbers)}
    colours = torch.stack([probes.colours(picture) for picture in pictures])
    tokens = picture_tokens(mllm, pictures).float().cpu()
    reader = Reader(mllm, world, tokens.numpy())  # of this user's pictures alone, by their places
    rows = defaultdict(list)
    for k, one in enumerate(dealt):
        shown = [np.array([place[n]]) for n in one.asked]
        told = [history_of(one, place), *([history_of(others[k], place)] if others else [])]
        asked = [
            Conversation(told[0]),
            *(Conversation(history, WOULD, shown=picture) for history in told for picture in shown),
        ]
        states = reader.forward(reader.batch(asked))[0].cpu()
        rows["history"].append(states[0])
        rows["asked"].append(states[1:3])
        if others:
            rows["stranger"].append(states[3:5])
        sides = [[place[n] for n in side] for side in (one.liked, one.disliked, one.asked[:1], one.asked[1:])]
        width = states.shape[-1]  # Qwen3-VL's tokens carry deeper layers behind their own channels
        rows["colour"].append(torch.stack([colours[side].mean(0) for side in sides]))
        rows["embedding"].append(torch.stack([tokens[side][..., :width].mean((0, 1)) for side in sides]))
    return {name: torch.stack(values).half() for name, values in rows.items()}


def history_of(dealt: Dealt, place: dict[int, int]) -> History:
    """Its pictures by their places, liked and disliked by turns, without prompts."""
    order = interleaved(len(dealt.liked), len(dealt.disliked))
    pictures = np.array([place[n] for n in (*dealt.liked, *dealt.disliked)])[order]
    return History(pictures, order < len(dealt.liked), [""] * len(pictures))


def read_group(
    args: StageArgs[ProbeLayers], run, mllm, world: World, group: str, people: dict[int, list[Dealt]]
) -> dict:
    """Every user's tensors [users, k, ...] in fp32, read in pieces that are kept."""
    section = args.section
    from safetensors.torch import load_file

    users, parts = list(people), []
    for start in tqdm(range(0, len(users), PIECE), desc=f"{run.args.stage} {group}"):
        here = users[start : start + PIECE]
        key = json.dumps(
            [mllm.fingerprint, world.digest, group, section.histories, section.pictures, section.seed, here]
        )
        path = run.folder / "readings" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            rows = []
            for i, user in enumerate(here, start):
                others = people[users[(i + 1) % len(users)]] if group == "report" else None
                rows.append(read_user(mllm, world, people[user], others))
            save_weights({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, path)
        parts.append(load_file(str(path)))
    return {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}


@dataclass(frozen=True)
class View:
    """What a probe sees of a group's users: of a history [users, k, D], of a pair of asked pictures [users, k, D'], of
    the same pair after another user's history (the reported group's decoder layers alone)."""

    history: torch.Tensor
    pair: torch.Tensor
    stranger: torch.Tensor | None = None


def view_of(name, readings: dict, fitted: dict) -> View:
    """name: "colour", "embedding", "compared", or a tuple of decoder layers. fitted: readings of the probes' users."""
    if isinstance(name, str):
        source = "colour" if name == "colour" else "embedding"
        parts = readings[source]
        history, asked = parts[:, :, :2].flatten(2), parts[:, :, 2] - parts[:, :, 3]
        return View(history, asked if name == "embedding" else probes.likeness(parts, fitted[source]))
    layers = list(name)

    def pair(states):
        return (states[:, :, 0, layers] - states[:, :, 1, layers]).flatten(2)

    stranger = pair(readings["stranger"]) if "stranger" in readings else None
    return View(readings["history"][:, :, layers].flatten(2), pair(readings["asked"]), stranger)


def measure(fit: View, view: View, fit_truth: torch.Tensor, truth: torch.Tensor, seed: int) -> dict[str, np.ndarray]:
    """{measure: one number a user}, with `_shuffled` beside each; traits where attributes are known."""
    users, histories = view.history.shape[:2]
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(users * histories, generator=draw)
    fitted_rows = torch.randperm(users * (histories - 1), generator=draw)
    signs = torch.randint(0, 2, (fit.pair.shape[0] * fit.pair.shape[1],), generator=draw) * 2.0 - 1
    found = {
        "same_user": probes.same_user(view.history),
        "same_user_shuffled": probes.same_user(view.history, rows),
        "named": probes.named(view.history),
        "named_shuffled": probes.named(view.history, fitted_rows),
        "liked_first": probes.liked_first(fit.pair, view.pair),
        "liked_first_shuffled": probes.liked_first(fit.pair, view.pair, signs),
    }
    if view.stranger is not None:
        found["liked_first_stranger"] = probes.liked_first(fit.pair, view.stranger)
    if truth.any():
        order = torch.randperm(len(fit_truth), generator=draw)
        found["traits"] = probes.traits(fit.history, fit_truth, view.history, truth)
        found["traits_shuffled"] = probes.traits(fit.history, fit_truth, view.history, truth, order)
    return found


def choose(measured: list[dict[str, np.ndarray]]) -> dict:
    """{"sem_layers": [...], "core_layer": int} by the rule above, from every decoder layer's measures."""
    layers = len(measured)
    middle_to_upper = range(layers // 2, max(layers - 1, layers // 2 + 1))
    knows = [measured[i]["same_user"].mean() + measured[i]["named"].mean() for i in range(layers)]
    count = min(SEM_LAYERS, layers)
    windows = [
        np.mean([measured[i + j]["liked_first"] for j in range(count)], axis=0) for i in range(layers - count + 1)
    ]
    best = max(windows, key=lambda window: window.mean())
    start = next(i for i in reversed(range(len(windows))) if bootstrap(best - windows[i])[0] <= 0)
    return {
        "sem_layers": list(range(start, start + count)),
        "core_layer": max(middle_to_upper, key=knows.__getitem__),
    }


def summary(measured: dict[str, np.ndarray]) -> dict:
    return {name: {"mean": round(float(v.mean()), 4), "ci95": bootstrap(v)} for name, v in measured.items()}


def truth_of(world: World, users) -> torch.Tensor:
    """[users, attributes]: 1 where a taste of the user's likes it."""
    truth = torch.zeros(len(users), len(world.attributes))
    for row, user in zip(truth, users, strict=True):
        row[[a for taste in world.tastes(user) for a in taste]] = 1
    return truth


def analyse(readings: dict[str, dict], truth: dict[str, torch.Tensor], seed: int) -> dict:
    """Choose on one group, report on another. readings, truth: {group: ...} as `read_group` and `truth_of` give."""

    def measured(name, group):
        fit, here = readings["fit"], readings[group]
        return measure(view_of(name, fit, fit), view_of(name, here, fit), truth["fit"], truth[group], seed)

    layers = readings["fit"]["history"].shape[2]
    chosen = choose([measured((i,), "choose") for i in range(layers)])
    rows = {name: name for name in ("colour", "embedding", "compared")} | {str(i): (i,) for i in range(layers)}
    rows |= {"e_sem": tuple(chosen["sem_layers"]), "e_core": (chosen["core_layer"],)}
    by_user = {row: measured(name, "report") for row, name in rows.items()}
    names = [n for n in by_user["colour"] if not n.endswith("_shuffled")]
    less = {
        f"{row} - {other}": summary({n: by_user[row][n] - by_user[other][n] for n in names})
        for row in ("e_sem", "e_core")
        for other in (str(layers - 1), "embedding", "compared", "colour")
    }
    table = {row: summary(values) for row, values in by_user.items()}
    return chosen | {"table": table, "differences": less, "unbeaten": unbeaten(by_user, layers)}


def unbeaten(by_user: dict[str, dict[str, np.ndarray]], layers: int) -> list[str]:
    """A sentence for every measure and control that no decoder layer beats. by_user: {row: {measure: [users]}}.

    A layer beats a control when the interval of their difference, over users, lies above zero: 95 % for all layers
    together (Bonferroni), since the best of many is above zero by luck.
    """
    sentences = []
    for name, words in MEASURES.items():
        if name not in by_user["colour"]:
            continue
        for label, row, measure in (("shuffled labels", None, f"{name}_shuffled"), ("colour alone", "colour", name)):
            less = [by_user[str(i)][name] - by_user[row or str(i)][measure] for i in range(layers)]
            if not any(np.percentile(resampled(difference), 2.5 / layers) > 0 for difference in less):
                sentences.append(f"No layer beats {label} in '{words}'.")
    return sentences


def main() -> None:
    args = arguments(ProbeLayers, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    world = open_world(args.config, args.runs)
    train = world.users("train", 2 * section.users)
    groups = {
        "fit": train[: section.users],
        "choose": train[section.users :],
        "report": world.users("test", section.users),
    }
    people = {}
    for group, users in groups.items():
        dealt = {user: deal(world, user, section.histories, section.pictures, section.seed) for user in users}
        people[group] = {user: histories for user, histories in dealt.items() if histories}
        if len(people[group]) < 2:
            raise DataError(
                f"{len(people[group])} of {len(users)} users have the pictures for {section.histories} histories with "
                "one more liked and disliked picture each: set probe_layers.histories lower, or users higher."
            )
    mllm = mllm_of(args, world)
    readings = {group: read_group(args, run, mllm, world, group, people[group]) for group in GROUPS}
    figures = analyse(readings, {group: truth_of(world, people[group]) for group in GROUPS}, section.seed)
    figures |= {"histories": section.histories, "users": {group: len(people[group]) for group in GROUPS}}
    layers = {key: figures[key] for key in ("sem_layers", "core_layer")}
    for sentence in figures["unbeaten"]:
        print(f"probe_layers: {sentence} The layers that it chose mean little there.", file=sys.stderr, flush=True)
    draw(figures, run.folder / "layers.png")
    write_atomic(run.folder / "probes.md", page(figures).encode())
    write_atomic(run.folder / "layers.json", json.dumps(layers).encode())
    run.finish(**figures)


if __name__ == "__main__":
    with exit_with_message():
        main()
