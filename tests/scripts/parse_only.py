"""Run commands of the repository up to where they have read their options.

stdin: a JSON list of [module or script, its words]. Prints a JSON list: for each "parsed", or what argparse said.
Nothing of a command runs but its imports and what comes before its options are read; one that reads none isn't run.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import runpy
import sys
import warnings
from pathlib import Path

OWN = argparse.__name__
NO_OPTIONS = "reads no options"


class Parsed(Exception):
    """The options were read without a complaint."""


def stopping(method):
    def parse(self, *args, **options):
        result = method(self, *args, **options)
        # argparse calls these methods from one another, and for subcommands: only the command's own call ends it.
        if sys._getframe(1).f_globals["__name__"] != OWN:
            raise Parsed
        return result

    return parse


def source_of(name):
    """The text of a script, or of what `python -m` runs of a module."""
    if name.endswith(".py"):
        return Path(name).read_text(encoding="utf-8")
    spec = importlib.util.find_spec(name)
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{name}.__main__")
    return Path(spec.origin).read_text(encoding="utf-8")


def outcome(name, words):
    if not re.search(r"argparse|\barguments\(|parse_args", source_of(name)):
        return NO_OPTIONS
    sys.argv = [name, *words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if name.endswith(".py"):
                sys.path.insert(0, str(Path(name).parent.resolve()))
                runpy.run_path(name, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Parsed:
        return "parsed"
    except SystemExit as end:
        return f"exit {end.code}: {said.getvalue()}"
    raise SystemExit(f"{name} ran to its end")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # that a module is imported already, by another command
    sys.path[0] = str(Path.cwd())
    for each in ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args"):
        setattr(argparse.ArgumentParser, each, stopping(getattr(argparse.ArgumentParser, each)))
    print(json.dumps([outcome(name, words) for name, words in json.load(sys.stdin)]))
