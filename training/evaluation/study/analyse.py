"""What the answers say: win rates, agreement between judges, and whether the judges can be relied on."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from prefgen.files import write_atomic

from ...common.statistics import DRAWS, ci95, crossed, weights
from ...data.errors import DataError
from .agreement import alpha, observed
from .answers import Answer, read_answers, read_key
from .report import page


def analyse(folder: Path, files: list[Path], min_consistency: float = 0.0) -> str:
    """Write study.json and study.md to `folder`. Returns what to print."""
    key = read_key(folder)
    answers = read_answers(files, key)
    trials = sum(entry["mirrors"] is None for entry in key["trials"].values())
    result = {
        "study": key["study"],
        "files": len(files),
        "trials": trials,
        "repeats": len(key["trials"]) - trials,
        "users": len({entry["user"] for entry in key["trials"].values()}),
        "draws": DRAWS,
        "min_consistency": min_consistency,
        "duplicates": answers.duplicates,
        "conflicting_duplicates": answers.conflicts,
        **measure(answers.latest, key, min_consistency),
    }
    try:
        write_atomic(folder / "study.json", (json.dumps(result, indent=1) + "\n").encode())
        write_atomic(folder / "study.md", page(result).encode())
    except OSError as error:
        raise DataError(f"Can't write to {folder}: {error.strerror or error}.") from error
    lines = [
        f"{e['a']} over {e['b']}: {e['win_rate']:.1%} [{e['ci95'][0]:.1%}, {e['ci95'][1]:.1%}]" for e in result["pairs"]
    ]
    return "\n".join([*lines, f"{folder / 'study.md'}  {folder / 'study.json'}"])


def measure(answers: list[Answer], key: dict, min_consistency: float = 0.0) -> dict:
    """Everything the page says, from the answers that count."""
    by_judge = grouped(answers, lambda answer: answer.judge)
    judges = {judge: judge_report(by_judge[judge], key) for judge in sorted(by_judge)}
    for entry in judges.values():
        entry["counted"] = entry["consistency"] is None or entry["consistency"] >= min_consistency
    of_counted_judges = [answer for answer in answers if judges[answer.judge]["counted"]]
    # Repeats serve the consistency of judges: counted as well, they would weigh their trials twice.
    counted = [answer for answer in of_counted_judges if not key["trials"][answer.trial]["mirrors"]]
    if not counted:
        raise DataError("No answer is left to count: lower --min-consistency or bring more files.")
    return {
        "counted_answers": len(counted),
        "pairs": pair_reports(counted, key),
        "overall": {
            method: win_rate(own, key, method)
            for method in key["methods"]
            if (own := [answer for answer in counted if method in methods_of(answer, key)])
        },
        "agreement": agreement(counted, key, lambda answer: position_of(answer, key)),
        "left": left_share(of_counted_judges),
        "judges": judges,
    }


def pair_reports(answers: list[Answer], key: dict) -> list[dict]:
    """Win rate and agreement of every two methods that were compared, in the order of the key."""
    by_pair = grouped(answers, lambda answer: frozenset(methods_of(answer, key)))
    return [
        {"a": a, "b": b, **win_rate(own, key, a), "agreement": agreement(own, key, lambda answer: answer.method)}
        for a, b in combinations(key["methods"], 2)
        if (own := by_pair.get(frozenset((a, b))))
    ]


def grouped(answers: list[Answer], by: Callable[[Answer], Hashable]) -> dict:
    """{key: answers with it}, keys by their first answer."""
    groups = defaultdict(list)
    for answer in answers:
        groups[by(answer)].append(answer)
    return groups


def user_of(answer: Answer, key: dict) -> str:
    return key["trials"][answer.trial]["user"]


def methods_of(answer: Answer, key: dict) -> Iterable[str]:
    return key["trials"][answer.trial]["pictures"].values()


def position_of(answer: Answer, key: dict) -> int | None:
    """Which of its trial's two pictures was chosen, None for no difference: a label that all pairs of methods share."""
    return None if answer.picture is None else list(key["trials"][answer.trial]["pictures"]).index(answer.picture)


def win_rate(answers: list[Answer], key: dict, a: str) -> dict:
    """How often `a` is chosen over the other method of the same trials; no difference counts as half a win.

    The interval resamples users and judges, each on their own, since both repeat.
    """
    users = sorted({user_of(answer, key) for answer in answers})
    judges = sorted({answer.judge for answer in answers})
    sums = np.zeros((len(users), len(judges)))
    counts = np.zeros_like(sums)
    for answer in answers:
        cell = users.index(user_of(answer, key)), judges.index(answer.judge)
        sums[cell] += 0.5 if answer.method is None else answer.method == a
        counts[cell] += 1
    wins = sum(answer.method == a for answer in answers)
    ties = sum(answer.method is None for answer in answers)
    return {
        "answers": len(answers),
        "users": len(users),
        "judges": len(judges),
        "wins": wins,
        "losses": len(answers) - wins - ties,
        "no_difference": ties,
        "win_rate": round(float(sums.sum() / counts.sum()), 4),
        "ci95": ci95(crossed(sums, counts)),
        "no_difference_rate": round(ties / len(answers), 4),
    }


def agreement(answers: list[Answer], key: dict, label: Callable[[Answer], Hashable]) -> dict:
    """Krippendorff's nominal alpha of the answers' labels, its interval over users, and the plain agreement of two
    judges. None where nobody shares a trial or everyone always says the same."""
    labels = list(dict.fromkeys(map(label, answers)))
    by_trial = list(grouped(answers, lambda answer: answer.trial).values())
    counts = np.array([[sum(label(answer) == each for answer in own) for each in labels] for own in by_trial])
    owners = [user_of(own[0], key) for own in by_trial]
    # Users are resampled, not trials: the trials of one user are of one taste.
    users = list(dict.fromkeys(owners))
    of_user = [users.index(owner) for owner in owners]
    value = alpha(counts)
    same = observed(counts)
    interval = None
    if not np.isnan(value):
        draws = np.array([alpha(np.repeat(counts, times[of_user], axis=0)) for times in weights(len(users), 0)])
        interval = ci95(draws[~np.isnan(draws)])
    return {
        "trials": int((counts.sum(1) > 1).sum()),
        "alpha": None if np.isnan(value) else round(value, 4),
        "ci95": interval,
        "same_answer": None if np.isnan(same) else round(same, 4),
    }


def left_share(answers: Iterable[Answer]) -> dict:
    """How often the left picture is chosen where one is; sides are random, so that half is expected."""
    sides = [answer.choice for answer in answers if answer.choice != "same"]
    if not sides:
        return {"choices": 0, "left": None, "ci95": None}
    left = sides.count("left")
    interval = binomtest(left, len(sides)).proportion_ci(method="wilson")
    return {
        "choices": len(sides),
        "left": round(left / len(sides), 4),
        "ci95": [round(float(bound), 4) for bound in interval],
    }


def judge_report(answers: list[Answer], key: dict) -> dict:
    """One judge's answers: how complete, how consistent, how fast, how fond of one side."""
    by_trial = {answer.trial: answer for answer in answers}
    repeats = [(answer, by_trial.get(key["trials"][answer.trial]["mirrors"])) for answer in answers]
    checks = [again.method == first.method for again, first in repeats if first is not None]
    return {
        "answers": len(answers),
        "missing": len(key["trials"]) - len(answers),
        "repeats": len(checks),
        "failed_repeats": len(checks) - sum(checks),
        "consistency": round(sum(checks) / len(checks), 4) if checks else None,
        "left": left_share(answers),
        "no_difference_rate": round(sum(answer.method is None for answer in answers) / len(answers), 4),
        "median_seconds": round(float(np.median([answer.milliseconds for answer in answers])) / 1000, 2),
    }
