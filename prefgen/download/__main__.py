"""Fetch a set of model files by its name; nothing else in PrefGen ever downloads.

    python -m prefgen.download              the names, with sizes and licences
    python -m prefgen.download sdxl         one set, into the models folder of the ComfyUI that PrefGen lies in

Every file is pinned to a revision, a size and a SHA-256 (sets.json) and comes to its place only when all of them are
right. The same command goes on where it was stopped; what is there already is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from pathlib import Path

if __package__:
    from .fetch import DownloadError, FileSet, PinnedFile, fetch, load_sets
else:
    # Run by this folder's path: an embedded Python looks for no module in the current folder.
    from fetch import DownloadError, FileSet, PinnedFile, fetch, load_sets  # type: ignore[import-not-found, no-redef]

PACK = Path(__file__).resolve().parents[2]


def models_folder(models: Path | None) -> Path:
    """--models, or the folder of the ComfyUI that the pack lies in. DownloadError when there is none."""
    if models is not None:
        if not models.is_dir():
            raise DownloadError(f"--models {models} isn't a folder.")
        return models
    for pack in (Path.cwd(), PACK):
        folder = pack.parent.parent / "models"
        if pack.parent.name == "custom_nodes" and folder.is_dir():
            return folder
    raise DownloadError("PrefGen isn't inside a ComfyUI here: name the models folder with --models.")


def size(count: int) -> str:
    """ "2.57 GB", in powers of ten, as model hubs count."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def listed(sets: dict[str, FileSet]) -> str:
    """One line a set: its name, size, licence and what it is."""
    width = max(map(len, sets), default=0)
    return "\n".join(f"{name:<{width}} {size(s.bytes):>8}  {s.licence:<11} {s.what}" for name, s in sets.items())


class ProgressLine:
    """Writes how far each file is to standard error, on one line a file."""

    def __init__(self) -> None:
        self.shown: tuple[str, int] | None = None

    def __call__(self, file: PinnedFile, done: int) -> None:
        percent = min(100, 100 * done // file.bytes)
        if self.shown != (file.to, percent):
            self.shown = (file.to, percent)
            end = "\n" if percent == 100 else ""
            print(f"\r{Path(file.to).name}: {percent}% of {size(file.bytes)}", end=end, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m prefgen.download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a set's name; without one the sets are listed")
    parser.add_argument("--models", type=Path, help="ComfyUI's models folder")
    parser.add_argument("--sets", type=Path, help="another list of sets, in the layout of sets.json")
    args = parser.parse_args()
    # A shell starts background jobs with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sets = load_sets(args.sets)
        if args.name is None:
            print(listed(sets))
            return
        if args.name not in sets:
            raise DownloadError(f"There is no set {args.name!r}: choose {', '.join(sets)}.")
        folder = models_folder(args.models)
        chosen = sets[args.name]
        free = size(shutil.disk_usage(folder).free)
        print(f"{args.name}: {size(chosen.bytes)}, {chosen.licence}, into {folder} ({free} free)", flush=True)
        for path in fetch(chosen, folder, ProgressLine()):
            print(path, flush=True)
    except DownloadError as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        raise SystemExit(
            f"{error.filename} can't be used ({error.strerror}): see what it is and who owns it."
        ) from error
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
