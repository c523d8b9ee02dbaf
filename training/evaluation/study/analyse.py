"""What the answers say: win rates, agreement between judges, and whether the judges can be relied on."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np

from prefgen.files import write_atomic

from ...common.statistics import DRAWS, ci95, crossed, weights
from ...data.errors import DataError
from .agreement import alpha, coincidences, observed
from .answers import Answer, read_answers, read_key
from .report import page


def win_rate(answers: list[Answer], key: dict, a: str) -> dict:
    """How often `a` is chosen over the other method of the same trials; no difference counts as half a win.

    The interval resamples users and judges, each on their own, since both repeat.
    """
    users = sorted({key["trials"][answer.trial]["user"] for answer in answers})
    judges = sorted({answer.judge for answer in answers})
    sums, counts = np.zeros((2, len(users), len(judges)))
    for answer in answers:
        cell = users.index(key["trials"][answer.trial]["user"]), judges.index(answer.judge)
        sums[cell] += 0.5 if answer.method is None else answer.method == a
        counts[cell] += 1
    wins, ties = sum(answer.method == a for answer in answers), sum(answer.method is None for answer in answers)
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


def agreement(values: dict[str, dict[str, str]], key: dict) -> dict:
    """values: {trial: {judge: label}}. Krippendorff's nominal alpha, its interval over users, and the plain agreement
    of two judges. None where nobody shares a trial or everyone always says the same."""
    labels = sorted({label for given in values.values() for label in given.values()})
    by_user: dict[str, np.ndarray] = {}
    for trial, given in values.items():
        user = key["trials"][trial]["user"]
        by_user[user] = by_user.get(user, 0) + coincidences(list(given.values()), labels)
    cells = np.stack(list(by_user.values()))
    total, drawn = cells.sum(0), alpha(np.tensordot(weights(len(cells), 0), cells, 1))
    value, known = float(alpha(total)), drawn[~np.isnan(drawn)]
    found = None if np.isnan(value) else round(value, 4)
    return {
        "trials": sum(len(given) > 1 for given in values.values()),
        "alpha": found,
        "ci95": None if found is None else ci95(known),
        "same_answer": None if not total.any() else round(observed(total), 4),
    }


def wilson(successes: int, n: int) -> list[float]:
    """95 % interval of a share, by Wilson's score."""
    z, p = 1.959964, successes / n
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [round(float((centre + sign * half) / (1 + z**2 / n)), 4) for sign in (-1, 1)]


def left_share(answers: Iterable[Answer]) -> dict:
    """How often the left picture is chosen where one is; sides are random, so that half is expected."""
    sides = [answer.choice for answer in answers if answer.choice != "same"]
    left = sides.count("left")
    if not sides:
        return {"choices": 0, "left": None, "ci95": None}
    return {"choices": len(sides), "left": round(left / len(sides), 4), "ci95": wilson(left, len(sides))}


def judge_report(given: dict[str, Answer], key: dict) -> dict:
    """One judge's answers, {trial: answer}: how complete, how consistent, how fast, how fond of one side."""
    trials = key["trials"]
    repeats = [trial for trial, entry in trials.items() if entry["mirrors"]]
    checks = [(given[t], given[trials[t]["mirrors"]]) for t in repeats if t in given and trials[t]["mirrors"] in given]
    passed = sum(first.method == second.method for first, second in checks)
    return {
        "answers": len(given),
        "missing": len(trials) - len(given),
        "repeats": len(checks),
        "failed_repeats": len(checks) - passed,
        "consistency": round(passed / len(checks), 4) if checks else None,
        "left": left_share(given.values()),
        "no_difference_rate": round(sum(a.method is None for a in given.values()) / len(given), 4),
        "median_seconds": round(float(np.median([a.milliseconds for a in given.values()])) / 1000, 2),
    }


def measure(answers: list[Answer], key: dict, min_consistency: float = 0.0) -> dict:
    """Everything the page says, from the answers that count."""
    by_judge: dict[str, dict[str, Answer]] = defaultdict(dict)
    for answer in answers:
        by_judge[answer.judge][answer.trial] = answer
    judges = {judge: judge_report(by_judge[judge], key) for judge in sorted(by_judge)}
    for entry in judges.values():
        entry["counted"] = entry["consistency"] is None or entry["consistency"] >= min_consistency
    counted = [a for a in answers if judges[a.judge]["counted"] and not key["trials"][a.trial]["mirrors"]]
    if not counted:
        raise DataError("No answer is left to count: lower --min-consistency or bring more files.")
    by_pair: dict[frozenset, list[Answer]] = defaultdict(list)
    for answer in counted:
        by_pair[frozenset(key["trials"][answer.trial]["pictures"].values())].append(answer)
    pairs = []
    for a, b in combinations(key["methods"], 2):
        if given := by_pair.get(frozenset((a, b))):
            values: dict[str, dict[str, str]] = defaultdict(dict)
            for answer in given:
                values[answer.trial][answer.judge] = answer.method or ""
            pairs.append({"a": a, "b": b, **win_rate(given, key, a), "agreement": agreement(values, key)})
    overall = {}
    for method in key["methods"]:
        if given := [x for x in counted if method in key["trials"][x.trial]["pictures"].values()]:
            overall[method] = win_rate(given, key, method)
    positions: dict[str, dict[str, str]] = defaultdict(dict)
    for answer in counted:
        names = list(key["trials"][answer.trial]["pictures"])
        positions[answer.trial][answer.judge] = "" if answer.picture is None else str(names.index(answer.picture))
    return {
        "counted_answers": len(counted),
        "pairs": pairs,
        "overall": overall,
        "agreement": agreement(positions, key),
        "left": left_share(a for a in answers if judges[a.judge]["counted"]),
        "judges": judges,
    }


def analyse(folder: Path, files: list[Path], min_consistency: float = 0.0) -> str:
    """Write study.json and study.md to `folder`. Returns what to print."""
    key = read_key(folder)
    answers = read_answers(files, key)
    originals = sum(entry["mirrors"] is None for entry in key["trials"].values())
    result = {
        "study": key["study"],
        "files": len(files),
        "trials": originals,
        "repeats": len(key["trials"]) - originals,
        "users": len({entry["user"] for entry in key["trials"].values()}),
        "draws": DRAWS,
        "min_consistency": min_consistency,
        "duplicates": answers.duplicates,
        "conflicting_duplicates": answers.conflicts,
        **measure(answers.given, key, min_consistency),
    }
    text = page(result)
    try:
        write_atomic(folder / "study.json", (json.dumps(result, indent=1) + "\n").encode())
        write_atomic(folder / "study.md", text.encode())
    except OSError as error:
        raise DataError(f"Can't write to {folder}: {error.strerror or error}.") from error
    lines = [
        f"{e['a']} over {e['b']}: {e['win_rate']:.1%} [{e['ci95'][0]:.1%}, {e['ci95'][1]:.1%}]" for e in result["pairs"]
    ]
    return "\n".join([*lines, f"{folder / 'study.md'}  {folder / 'study.json'}"])
