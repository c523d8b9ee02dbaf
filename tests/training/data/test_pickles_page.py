"""docs/pickles.md: the script that it prints turns both published layouts into sets that pass the check."""

import ast
import importlib
import io
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.training.commands import ROOT
from training.data.check import check

USERS = 40
SCRIPT = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/pickles.md").read_text(encoding="utf-8"), re.M | re.S)[1]


def png(number):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_agents(folder):
    """Four choices a user; the first user also judges a picture twice."""
    (folder / "pictures").mkdir()
    agents = {}
    for user in range(USERS):
        numbers = range(8 * user, 8 * user + 8)
        for number in numbers:
            (folder / "pictures" / f"{number}.png").write_bytes(png(number))
        choices = [[f"../{n}.png", f"far/{n + 1}.png", f"a hill {n % 37}"] for n in numbers[::2]]
        agents[f"user-{user}"] = [*choices, {"note": "metadata"}]
    agents["user-0"].insert(0, ["1.png", "0.png", "a hill 0"])
    (folder / "published.pkl").write_bytes(pickle.dumps(agents))
    return [folder / "pictures"]


def write_frame(folder):
    """Two liked, two disliked and a choice a user. One row lacks a picture, one a winner; one user likes nothing."""
    pandas = pytest.importorskip("pandas")
    rows = []
    for user in range(USERS):
        pictures = [png(10 * user + i) for i in range(6)]
        row = {"user_id": user, "reference_list": pictures[:2], "reference_list_bad": pictures[2:4]}
        row |= {"reference_prompt_list": [f"a hill {user}"] * 2, "image0": pictures[4], "image1": pictures[5]}
        rows.append(row | {"prompt": f"a sea {user}", "label0": user % 2})
    rows[3]["image1"] = None
    rows[4]["label0"] = 0.5
    rows.append(rows[5] | {"user_id": USERS, "reference_list": []})
    pandas.DataFrame(rows).to_pickle(folder / "published.pkl")
    return []


def test_what_the_script_imports_of_ours_is_there():
    imports = [node for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module.startswith("training")]
    assert ours and all(hasattr(importlib.import_module(n.module), name.name) for n in ours for name in n.names)


@pytest.mark.parametrize("write", [write_agents, write_frame])
def test_the_script_makes_a_set_that_passes_the_check(tmp_path, write):
    pytest.importorskip("pandas")
    arguments = write(tmp_path)
    (tmp_path / "read_pickles.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "torch.py").write_text("raise ImportError('the throw-away environment has no torch')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "read_pickles.py", "published.pkl", "set", *arguments]
    ran = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [(name, faults) for name, faults in check(tmp_path / "set", pictures=True) if faults] == []
    rows = pq.read_table(tmp_path / "set/pictures").to_pylist()
    history = {(row["user"], row["picture"]): row["verdict"] for row in rows if not row["heldout"]}
    assert len({user for user, _ in history}) == USERS
    pairs = pq.read_table(tmp_path / "set/pairs.parquet").to_pylist()
    if write is write_agents:
        assert len(rows) == 8 * USERS and len(pairs) == USERS
        # user-0 judges 0 and 1 twice: the first verdict stays, and neither is asked about.
        assert history[0, "0.png"] == "liked" and history[0, "1.png"] == history[0, "2.png"] == "disliked"
        assert {(pair["liked"], pair["disliked"]) for pair in pairs} >= {("7.png", "6.png"), ("15.png", "14.png")}
    else:
        assert len(history) == 4 * USERS and len(pairs) == USERS - 2
        images = {row["picture"]: row["image"] for row in rows}
        won = {pair["user"]: images[pair["liked"]] for pair in pairs}
        assert won[0] == png(5) and won[1] == png(14)


def test_picklescan_names_what_would_run(tmp_path):
    pytest.importorskip("picklescan")
    (tmp_path / "sound.pkl").write_bytes(pickle.dumps({"user": [["a.png", "b.png", "a hill"], {}]}))
    (tmp_path / "bad.pkl").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    scan = [sys.executable, "-c", "import sys, picklescan.cli; sys.exit(picklescan.cli.main())", "--path"]
    assert [subprocess.run([*scan, tmp_path / f"{name}.pkl"]).returncode for name in ("sound", "bad")] == [0, 1]
