"""Stage 10: which layers know the user.

    python -m training.probe_layers --config atelier

In: the finished MLLM, and histories of users that no probe is fitted on. Out: `layers.json`, the layers of e_sem and
e_core, which every later stage reads; `probes.md` and `layers.png`, what each layer knows. Readings stay beside them: a
stopped stage goes on.

The paper (arXiv 2512.06020) tells layers apart by two tasks and takes e_sem from the top four, e_core from a
middle-to-upper layer. Every decoder layer's last token is probed:
- inter-user, whose history is this: `same_user` (retrieval) and `named` (linear probe), over several histories of each
  user that share no picture and no prompt;
- intra-user, liked or disliked: `liked_first`. The MLLM reads a history, then one more picture without a verdict and
  the question whether the user would like it; a linear probe fitted on other users must put a liked picture above a
  disliked one of the same user. A verdict in the text would be read off by any layer, and the attributes of a taste
  are known in simulated worlds only, so this is the task that stays sound everywhere;
- `traits`, where the world knows its attributes: a linear probe names what is liked. Ours.
Prompts are left out: they would give a real user away.

Controls: shuffled labels; `colour`, the mean colour and the colour histogram of the same pictures, liked and disliked
by themselves; `embedding`, the decoder's input: mean image tokens of the liked and of the disliked pictures, and for
`liked_first` the asked picture's (the last token's own embedding is one word for all). A linear probe can't compare a
picture with a history, so for `liked_first` colour has the products of both, and the row `compared` has them for the
embedding. For `liked_first` also `stranger`, the same pictures after another user's history.

Three groups of users: the probes are fitted on the first (training split), the layers are chosen on the second
(training split), the figures come from the third (test split). The rule: e_core is the middle-to-upper layer with the
best mean of `same_user` and `named`; e_sem the uppermost four neighbouring layers whose mean `liked_first` can't be
told from that of the best four (the 95 % interval of their difference, over users, holds zero), so the paper's top four
unless the probe speaks against them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from prefgen.atelier.models import MLLM_FOLDER
from prefgen.files import write_atomic
from prefgen.mllm.model import PreferenceMLLM

from .common.chain import made_of
from .common.config.command import StageArgs, arguments
from .common.config.schema import ProbeLayers
from .common.errors import exit_with_message
from .common.files import save_weights
from .common.run import Run
from .common.statistics import bootstrap, resampled
from .data.atelier_users import interleaved
from .data.errors import DataError
from .data.open_world import open_world
from .data.preference_questions import WOULD
from .data.readers import Conversation, Reader, load_reader, picture_tokens
from .data.schema import normal_prompt
from .data.worlds import History, World
from .evaluation import probes
from .evaluation.probe_page import MEASURES, draw, page

# In a file of readings.
USERS_AT_ONCE = 16
GROUPS = ("fit", "choose", "report")
# As many as in the paper.
SEM_LAYERS = 4


def main() -> None:
    args = arguments(ProbeLayers, __doc__)
    section = args.section
    world = open_world(args.config, args.runs)
    run = Run(args, made_of=made_of(args.config, args.runs, args.stage, world.digest))
    if run.finished:
        return
    train = world.users("train", 2 * section.users)
    test = world.users("test", section.users)
    groups = {"fit": train[: section.users], "choose": train[section.users :], "report": test}
    people = {group: people_of(world, users, section) for group, users in groups.items()}
    mllm = load_mllm(args, world)
    run.claim()
    readings = {group: read_group(args, run, mllm, world, group, people[group]) for group in GROUPS}
    truth = {group: liked_attributes(world, people[group]) for group in GROUPS}
    figures = analyse(readings, truth, section.seed)
    figures |= {"histories": section.histories, "users": {group: len(people[group]) for group in GROUPS}}
    for sentence in figures["unbeaten"]:
        print(f"probe_layers: {sentence} The layers that it chose mean little there.", file=sys.stderr, flush=True)
    draw(figures, run.folder / "layers.png")
    write_atomic(run.folder / "probes.md", page(figures).encode())
    layers = {key: figures[key] for key in ("sem_layers", "core_layer")}
    write_atomic(run.folder / "layers.json", json.dumps(layers).encode())
    run.finish(**figures)


@dataclass(frozen=True)
class ProbeHistory:
    """Numbers of a history's pictures, and of a liked and a disliked one that it does not hold."""

    liked: list[int]
    disliked: list[int]
    asked: tuple[int, int]

    @property
    def sides(self) -> list[list[int]]:
        """Liked, disliked, and the two that are asked about."""
        return [self.liked, self.disliked, *([number] for number in self.asked)]

    def as_history(self, place: dict[int, int]) -> History:
        """Its pictures by their places, liked and disliked by turns, without prompts."""
        order = interleaved(len(self.liked), len(self.disliked))
        pictures = np.array([place[number] for number in (*self.liked, *self.disliked)])[order]
        return History(pictures, order < len(self.liked), [""] * len(pictures))


def people_of(world: World, users: list[int], section: ProbeLayers) -> dict[int, list[ProbeHistory]]:
    """The histories of every user that has enough pictures. DataError where fewer than two have."""
    sampled = {user: sample_histories(world, user, section.histories, section.pictures, section.seed) for user in users}
    people = {user: histories for user, histories in sampled.items() if histories}
    if len(people) < 2:
        raise DataError(
            f"{len(people)} of {len(users)} users have the pictures for {section.histories} histories with "
            "one more liked and disliked picture each: set probe_layers.histories lower, or users higher."
        )
    return people


@dataclass
class PromptGroup:
    """A user's pictures of one prompt."""

    liked: list[int] = field(default_factory=list)
    disliked: list[int] = field(default_factory=list)


def sample_histories(world: World, user: int, count: int, pictures: int, seed: int) -> list[ProbeHistory] | None:
    """Several histories of a user, at most `pictures` of each verdict; no picture and no prompt stands in two, nor
    an asked picture's prompt in its own history. None for a user with too few pictures."""
    rng = np.random.default_rng([seed, user])
    most = count * (pictures + 1)
    drawn = world.history(user, rng, most, most)
    by_prompt: dict[object, PromptGroup] = defaultdict(PromptGroup)
    for number, liked, prompt in zip(drawn.pictures.tolist(), drawn.liked.tolist(), drawn.prompts, strict=True):
        group = by_prompt[normal_prompt(prompt) or number]
        (group.liked if liked else group.disliked).append(number)
    groups = list(by_prompt.values())
    groups = [groups[i] for i in rng.permutation(len(groups))]
    # Every history gets as many of the groups with liked pictures as any other.
    groups.sort(key=lambda group: (len(group.liked), len(group.liked) + len(group.disliked)))
    histories = [history_of(groups[number::count], pictures) for number in range(count)]
    return histories if all(histories) else None


def history_of(groups: list[PromptGroup], pictures: int) -> ProbeHistory | None:
    """One history of these prompts; None where a side stays empty."""
    asked_liked = next((group for group in reversed(groups) if group.liked), PromptGroup())
    # The disliked picture that is asked about is of the same prompt, or of any other.
    asked_disliked = next((group for group in (asked_liked, *groups) if group.disliked), PromptGroup())
    rest = [group for group in groups if group is not asked_liked and group is not asked_disliked]
    liked = [number for group in rest for number in group.liked][:pictures]
    disliked = [number for group in rest for number in group.disliked][:pictures]
    if not all((asked_liked.liked, asked_disliked.disliked, liked, disliked)):
        return None
    return ProbeHistory(liked, disliked, (asked_liked.liked[0], asked_disliked.disliked[0]))


def load_mllm(args: StageArgs[ProbeLayers], world: World) -> PreferenceMLLM:
    """The tuned MLLM. The pictures are read anew, so the atelier needs no cache of image tokens."""
    return PreferenceMLLM.load(MLLM_FOLDER) if args.config.mllm.path is None else load_reader(args, world).mllm


def read_group(
    args: StageArgs[ProbeLayers], run: Run, mllm: PreferenceMLLM, world: World, group: str, people: dict
) -> dict[str, torch.Tensor]:
    """Every user's tensors [users, k, ...] of `read_user` in fp32; files of some users each stay on the disk."""
    section = args.section
    users = list(people)
    # The reported users read each other's histories as well.
    strangers = dict(zip(users, [*users[1:], *users[:1]], strict=True)) if group == "report" else {}
    parts = []
    for start in tqdm(range(0, len(users), USERS_AT_ONCE), desc=f"{args.stage} {group}"):
        some = users[start : start + USERS_AT_ONCE]
        key = [mllm.fingerprint, world.digest, group, section.histories, section.pictures, section.seed, some]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        path = run.folder / "readings" / f"{name}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            rows = [read_user(mllm, world, people[user], people.get(strangers.get(user))) for user in some]
            save_weights({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, path)
        parts.append(load_file(str(path)))
    return {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}


@torch.inference_mode()
def read_user(
    mllm: PreferenceMLLM, world: World, histories: list[ProbeHistory], strangers: list[ProbeHistory] | None
) -> dict[str, torch.Tensor]:
    """One user's tensors, k histories, fp16: `history` [k, layers, D]; `asked` [k, 2, layers, D], with the liked and
    with the disliked picture; `embedding` and `colour` [k, 4, .] of the liked, the disliked, and the two asked
    pictures; with another user's histories also `stranger` [k, 2, layers, D]."""
    numbers = sorted({n for history in (*histories, *(strangers or ())) for side in history.sides for n in side})
    place = {number: i for i, number in enumerate(numbers)}
    pictures = world.pictures(numbers)
    tokens = picture_tokens(mllm, pictures).float().cpu()
    # Over this user's pictures alone, by their places among them.
    reader = Reader(mllm, world, tokens.numpy())
    colours = torch.stack([probes.colours(picture) for picture in pictures])
    # Qwen3-VL's tokens carry deeper layers behind their own channels.
    embeddings = tokens[..., : reader.fingerprint["hidden_size"]]
    rows = defaultdict(list)
    for history, stranger in zip(histories, strangers or [None] * len(histories), strict=True):
        states = read_history(reader, history, stranger, place)
        rows["history"].append(states[0])
        rows["asked"].append(states[1:3])
        if stranger is not None:
            rows["stranger"].append(states[3:5])
        sides = [[place[number] for number in side] for side in history.sides]
        rows["colour"].append(torch.stack([colours[side].mean(0) for side in sides]))
        rows["embedding"].append(torch.stack([embeddings[side].mean((0, 1)) for side in sides]))
    return {name: torch.stack(values).half() for name, values in rows.items()}


def read_history(
    reader: Reader, history: ProbeHistory, stranger: ProbeHistory | None, place: dict[int, int]
) -> torch.Tensor:
    """H [3 or 5, layers, D] of the history alone, with each asked picture, and with each after the stranger's."""
    own = history.as_history(place)
    contexts = [own] if stranger is None else [own, stranger.as_history(place)]
    shown = [np.array([place[number]]) for number in history.asked]
    conversations = [Conversation(context, WOULD, shown=picture) for context in contexts for picture in shown]
    return reader.forward(reader.batch([Conversation(own), *conversations]))[0].cpu()


def liked_attributes(world: World, users) -> torch.Tensor:
    """[users, attributes]: 1 where a taste of the user's likes it."""
    truth = torch.zeros(len(users), len(world.attributes))
    for row, user in zip(truth, users, strict=True):
        row[[a for taste in world.tastes(user) for a in taste]] = 1
    return truth


def analyse(readings: dict[str, dict], truth: dict[str, torch.Tensor], seed: int) -> dict:
    """Choose on one group, report on another. readings, truth: {group: ...} as `read_group` and `liked_attributes`
    give."""

    def measured(name, group: str) -> dict[str, np.ndarray]:
        fit = view_of(name, readings["fit"], readings["fit"])
        return measure(fit, view_of(name, readings[group], readings["fit"]), truth["fit"], truth[group], seed)

    layers = readings["fit"]["history"].shape[2]
    # On other users than those reported: the best of many layers is above the others by luck too.
    chosen = choose([measured((i,), "choose") for i in range(layers)])
    rows = {name: name for name in ("colour", "embedding", "compared")} | {str(i): (i,) for i in range(layers)}
    rows |= {"e_sem": tuple(chosen["sem_layers"]), "e_core": (chosen["core_layer"],)}
    by_user = {row: measured(name, "report") for row, name in rows.items()}
    names = [n for n in by_user["colour"] if not n.endswith("_shuffled")]
    differences = {
        f"{row} - {other}": summary({n: by_user[row][n] - by_user[other][n] for n in names})
        for row in ("e_sem", "e_core")
        for other in (str(layers - 1), "embedding", "compared", "colour")
    }
    table = {row: summary(values) for row, values in by_user.items()}
    return chosen | {"table": table, "differences": differences, "unbeaten": unbeaten(by_user, layers)}


def choose(measured: list[dict[str, np.ndarray]]) -> dict:
    """{"sem_layers": [...], "core_layer": int} by the rule above, from every decoder layer's measures."""
    layers = len(measured)
    # The upper half without the last layer; at least one of a very small model.
    middle_to_upper = range(layers // 2, max(layers - 1, layers // 2 + 1))
    inter_user = [layer["same_user"].mean() + layer["named"].mean() for layer in measured]
    count = min(SEM_LAYERS, layers)
    intra_user = [layer["liked_first"] for layer in measured]
    windows = [np.mean(intra_user[i : i + count], axis=0) for i in range(layers - count + 1)]
    best = max(windows, key=lambda window: window.mean())
    # From the top down: the first window that can't be told from the best one.
    start = next(i for i in reversed(range(len(windows))) if bootstrap(best - windows[i])[0] <= 0)
    return {
        "sem_layers": list(range(start, start + count)),
        "core_layer": max(middle_to_upper, key=inter_user.__getitem__),
    }


def unbeaten(by_user: dict[str, dict[str, np.ndarray]], layers: int) -> list[str]:
    """A sentence for every measure and control that no decoder layer beats. by_user: {row: {measure: [users]}}.

    A layer beats a control when the interval of their difference, over users, lies above zero: 95 % for all layers
    together (Bonferroni), since the best of many is above zero by luck.
    """
    sentences = []
    for name, words in MEASURES.items():
        if name not in by_user["colour"]:
            continue
        for label, row, control in (("shuffled labels", None, f"{name}_shuffled"), ("colour alone", "colour", name)):
            margins = [by_user[str(i)][name] - by_user[row or str(i)][control] for i in range(layers)]
            if not any(np.percentile(resampled(margin), 2.5 / layers) > 0 for margin in margins):
                sentences.append(f"No layer beats {label} in '{words}'.")
    return sentences


def summary(measured: dict[str, np.ndarray]) -> dict:
    return {name: {"mean": round(float(v.mean()), 4), "ci95": bootstrap(v)} for name, v in measured.items()}


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
        difference = parts[:, :, 2] - parts[:, :, 3]
        pair = difference if name == "embedding" else probes.likeness(parts, fitted[source])
        return View(parts[:, :, :2].flatten(2), pair)
    layers = list(name)

    def difference(states: torch.Tensor) -> torch.Tensor:
        return (states[:, :, 0, layers] - states[:, :, 1, layers]).flatten(2)

    stranger = difference(readings["stranger"]) if "stranger" in readings else None
    return View(readings["history"][:, :, layers].flatten(2), difference(readings["asked"]), stranger)


def measure(fit: View, view: View, fit_truth: torch.Tensor, truth: torch.Tensor, seed: int) -> dict[str, np.ndarray]:
    """{measure: one number a user}, with `_shuffled` beside each; traits where attributes are known."""
    users, histories = view.history.shape[:2]
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(users * histories, generator=draw)
    fitted_rows = torch.randperm(users * (histories - 1), generator=draw)
    signs = torch.randint(0, 2, (fit.pair.shape[0] * fit.pair.shape[1],), generator=draw) * 2.0 - 1
    by_user = {
        "same_user": probes.same_user(view.history),
        "same_user_shuffled": probes.same_user(view.history, rows),
        "named": probes.named(view.history),
        "named_shuffled": probes.named(view.history, fitted_rows),
        "liked_first": probes.liked_first(fit.pair, view.pair),
        "liked_first_shuffled": probes.liked_first(fit.pair, view.pair, signs),
    }
    if view.stranger is not None:
        by_user["liked_first_stranger"] = probes.liked_first(fit.pair, view.stranger)
    if truth.any():
        order = torch.randperm(len(fit_truth), generator=draw)
        by_user["traits"] = probes.traits(fit.history, fit_truth, view.history, truth)
        by_user["traits_shuffled"] = probes.traits(fit.history, fit_truth, view.history, truth, order)
    return by_user


if __name__ == "__main__":
    with exit_with_message():
        main()
