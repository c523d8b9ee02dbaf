"""The real ComfyUI, started and stopped by us, with this pack in it."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from scripts import setup_env
from scripts.comfy_server import ROOT, ComfyServer, GraphError, ServerError, fault_sentences, link_pack, remove_base

NODE_IDS = {
    "PrefGen_LoadPreferenceMLLM",
    "PrefGen_LoadPreferenceHistory",
    "PrefGen_EncodePreferenceHistory",
    "PrefGen_FuseUserVector",
    "PrefGen_ApplyUserCrossAttention",
    "PrefGen_LoadAtelier",
    "PrefGen_LookAtPictures",
    "PrefGen_ApplyTaste",
    "PrefGen_LabelledSheet",
}
PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test/blue"}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(setup_env.find_comfyui(), tmp_path_factory.mktemp("a base"), threads=1) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as connected:
        yield connected


def test_every_fault_of_a_refused_graph_is_a_sentence_that_names_its_node():
    answer = {
        "error": {
            "type": "prompt_outputs_failed_validation",
            "message": "Prompt outputs failed validation",
            "details": "",
        },
        "node_errors": {
            "9": {
                "class_type": "SaveImage",
                "errors": [
                    {"type": "required_input_missing", "message": "Required input is missing", "details": "images"}
                ],
            }
        },
    }
    assert fault_sentences(answer) == ["SaveImage (node 9): Required input is missing: images."]
    assert fault_sentences({"error": {"message": "Prompt has no outputs", "details": ""}, "node_errors": {}}) == [
        "ComfyUI refused the graph: Prompt has no outputs."
    ]
    assert fault_sentences({"prompt_id": "x", "node_errors": {}}) == []


def test_linking_the_pack_twice_and_removing_the_base_leave_the_pack_alone(tmp_path):
    pack, base = tmp_path / "pack", tmp_path / "base"
    pack.mkdir()
    (pack / "__init__.py").write_text("")
    for _ in range(2):
        assert link_pack(base, pack).resolve() == pack
    remove_base(base)
    assert not base.exists() and (pack / "__init__.py").exists()


@pytest.mark.slow
def test_the_server_knows_the_nodes_of_the_pack(client):
    assert set(client.object_info()) >= NODE_IDS


@pytest.mark.slow
def test_a_graph_runs_and_its_picture_comes_back(server, client):
    ((picture,),) = client.run(PICTURE).values()
    assert client.picture(picture).startswith(b"\x89PNG")
    assert (server.output_dir / "test" / picture["filename"]).exists()


@pytest.mark.slow
def test_a_refused_graph_is_a_sentence_and_the_next_one_runs(client):
    with pytest.raises(GraphError) as caught:
        client.queue({"2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}})
    assert caught.value.sentences == ["SaveImage (node 2): Required input is missing: images."]
    with pytest.raises(GraphError, match="NoSuchNode"):
        client.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    assert client.run(PICTURE)


@pytest.mark.slow
def test_a_failing_node_is_a_sentence_and_the_next_graph_runs(server, client):
    (server.input_dir / "no_picture.png").write_text("this is text")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "no_picture.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    with pytest.raises(GraphError, match=r"LoadImage \(node 1\): .*no_picture.png"):
        client.run(graph)
    assert client.run(PICTURE)


@pytest.mark.slow
def test_the_comfyui_folder_gets_no_output_and_no_database(server):
    folder = setup_env.find_comfyui()
    assert not (folder / "custom_nodes" / "prefgen").exists()
    assert (server.base / "user" / "comfyui.db").exists()


def test_a_server_that_cannot_start_says_why_and_leaves_nothing_running(tmp_path):
    broken = tmp_path / "ComfyUI"
    broken.mkdir()
    (broken / "main.py").write_text("raise SystemExit('the disk is full')")
    with pytest.raises(ServerError, match="the disk is full"):
        with ComfyServer(broken, tmp_path / "base"):
            pass


SLEEPER = """
import sys, time
from pathlib import Path
from scripts.comfy_server import ComfyServer, exit_on_terminate
from scripts.setup_env import find_comfyui
exit_on_terminate()
with ComfyServer(find_comfyui(), Path(sys.argv[1]), threads=1) as server:
    print(server.process.pid, server.port, flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_is_gone_after(number, tmp_path):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a child that its parent was killed")
    parent = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        pid, port = map(int, parent.stdout.readline().split())
        parent.send_signal(number)
        parent.wait(900)
        deadline = time.monotonic() + 900
        while running(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not running(pid)
        with pytest.raises(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=2)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def running(pid: int) -> bool:
    """True if the process is there and not merely waiting to be reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
