"""A real ComfyUI, headless, with this pack linked into it, and a client for its HTTP API and websocket.

    with ComfyServer(comfyui, base) as server:
        client = server.client()
        pictures = client.run(graph)

The server gets a base directory of its own (custom_nodes, input, output, models, user), listens on a free loopback
port and runs on the CPU. The ComfyUI folder itself is only read. Leaving the `with` block stops the whole process
group, after an error and after Ctrl-C as well; on Linux the kernel stops it even when this process is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "prefgen"
READY_SECONDS = 180.0
STOP_SECONDS = 10.0
# BinaryEventTypes.TEXT of ComfyUI's protocol.py.
TEXT_EVENT = struct.pack(">I", 3)


class ServerError(RuntimeError):
    """The server did not start or went away; the message says where its log lies."""


class GraphError(RuntimeError):
    """ComfyUI refused a graph or a node of it failed. `sentences` holds one sentence a fault."""

    def __init__(self, sentences: list[str]):
        self.sentences = sentences
        super().__init__(" ".join(sentences))


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_pack(base: Path, pack: Path = ROOT) -> Path:
    """Put a link to `pack` into `base`/custom_nodes and return it; a link from an earlier run is replaced."""
    link = base / "custom_nodes" / PACK_NAME
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    link.symlink_to(pack, target_is_directory=True)
    return link


def _die_with_parent() -> None:
    """In the child, on Linux: be terminated when the process that started it is gone, however it went."""
    # 1 is PR_SET_PDEATHSIG: after SIGKILL the parent can't stop anything any more, the kernel still can.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class ComfyServer:
    """One ComfyUI process. Use it as a context manager, or call start() and stop()."""

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        python: str = sys.executable,
        pack: Path | None = ROOT,
        port: int | None = None,
        threads: int | None = None,
        arguments: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        """`comfyui`: the folder with main.py; `base`: a folder to write in, made if missing; `pack`: linked into its
        custom_nodes, or None where what should run lies there already; `port`: a free one if None; `threads`: CPU
        threads for torch, its own choice if None; `arguments`: more options for ComfyUI; `environment`: variables of
        its process beside this one's, where the hub is offline unless HF_HUB_OFFLINE is among them."""
        self.comfyui = Path(comfyui)
        self.base = Path(base).resolve()
        self.python = python
        self.pack = pack
        self.port = port
        self.threads = threads
        self.arguments = list(arguments)
        self.environment = dict(environment or {})
        self.process: subprocess.Popen | None = None
        self.log_path = self.base / "comfyui.log"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def input_dir(self) -> Path:
        return self.base / "input"

    @property
    def output_dir(self) -> Path:
        return self.base / "output"

    def __enter__(self) -> ComfyServer:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_) -> None:
        self.stop()

    def client(self) -> ComfyClient:
        return ComfyClient(self.address, alive=self.check_alive)

    def start(self) -> ComfyServer:
        """Start the process and return when it answers. Raises ServerError with the end of its log."""
        for name in ("input", "output", "temp", "user", "models", "custom_nodes"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pack is not None:
            link_pack(self.base, self.pack)
        chosen = self.port
        for attempt in range(3):
            self.port = chosen or free_port()
            self._spawn()
            try:
                return self._wait_until_ready()
            except ServerError:
                # Another process may have taken the free port in between; any other fault comes again at once.
                if chosen or attempt == 2 or "in use" not in self.log_tail():
                    raise
                self.stop()
        return self

    def _spawn(self) -> None:
        command = [
            self.python,
            str(self.comfyui / "main.py"),
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
            "--database-url",
            f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
            "--disable-auto-launch",
            "--disable-api-nodes",
            *self.arguments,
        ]
        environment = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1", DO_NOT_TRACK="1") | self.environment
        if self.comfyui.resolve() != ROOT / ".comfyui":
            # A ComfyUI of the user's own is only read.
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def _wait_until_ready(self) -> ComfyServer:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError, ValueError):
                with urllib.request.urlopen(f"{self.address}/system_stats", timeout=5) as answer:
                    json.load(answer)
                return self
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {READY_SECONDS:.0f} seconds; its log is {self.log_path}.")

    def check_alive(self) -> None:
        """Raise ServerError if the process has ended."""
        if self.process is None or self.process.poll() is not None:
            raise ServerError(f"ComfyUI ended by itself; the end of its log ({self.log_path}):\n{self.log_tail()}")

    def log_tail(self, lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def stop(self) -> None:
        """End the whole process group: asked first, killed after 10 s. Ctrl-C waits for that. Safe to call twice."""
        process = self.process
        if process is None:
            return
        self.process = None
        with _deferred_interrupt():
            _signal_group(process, signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            # Whatever the leader left behind: nodes may have started processes of their own.
            _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
            process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.terminate()


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def _deferred_interrupt():
    """Hold Ctrl-C and its like back while the server is being stopped (only the main thread may say so)."""
    try:
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_on_terminate() -> None:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that `with ComfyServer(...)` stops the server."""

    def leave(number, _frame):
        sys.exit(128 + number)

    for number in STOP_SIGNALS:
        # SIGINT too: a shell starts background jobs with it ignored, and then nobody would hear it.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else leave)


def fault_sentences(answer: dict) -> list[str]:
    """The sentences of ComfyUI's answer to a graph that it refused (HTTP 400), each naming its node."""
    sentences = []
    for node_id, node in (answer.get("node_errors") or {}).items():
        for error in node["errors"]:
            details = f": {error['details']}" if error.get("details") else ""
            sentences.append(f"{node['class_type']} (node {node_id}): {error['message']}{details}".rstrip(".") + ".")
    error = answer.get("error")
    if not sentences and error:
        if isinstance(error, dict):
            error = f"{error.get('message', '')} {error.get('details', '')}".strip()
        sentences.append(f"ComfyUI refused the graph: {error}".rstrip(".") + ".")
    return sentences


class ComfyClient:
    """Queues graphs on a running ComfyUI and follows them on its websocket. For one thread; close() it at the end."""

    def __init__(self, address: str, alive: Callable[[], None] = lambda: None, timeout: float = 60.0):
        """`address`: "http://host:port"; `alive`: called while waiting, raises if the server is gone; `timeout`:
        seconds an HTTP answer may take."""
        import websocket

        self.address = address.rstrip("/")
        self.timeout = timeout
        self._alive = alive
        self.client_id = uuid.uuid4().hex
        self._socket = websocket.create_connection(
            f"{self.address.replace('http', 'ws', 1)}/ws?clientId={self.client_id}",
            timeout=timeout,
            enable_multithread=False,
        )
        self._ended: dict[str, list[str]] = {}

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._socket.close()

    def _request(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read()

    def get(self, path: str) -> dict | list:
        """GET a path of the API and return its JSON."""
        return json.loads(self._request(path))

    def object_info(self) -> dict:
        """The schema of every node the server knows, by node id."""
        return self.get("/object_info")

    def queue(self, graph: dict) -> str:
        """Queue an API-format graph and return its prompt id. Raises GraphError if ComfyUI refuses it."""
        try:
            answer = json.loads(self._request("/prompt", {"prompt": graph, "client_id": self.client_id}))
        except urllib.error.HTTPError as error:
            with error:
                body = error.read()
            try:
                sentences = fault_sentences(json.loads(body))
            except ValueError:
                sentences = []
            raise GraphError(sentences or [f"ComfyUI refused the graph (HTTP {error.code})."]) from None
        sentences = fault_sentences(answer)
        if sentences:
            # Where some outputs are valid, ComfyUI has queued those without the faulty ones.
            self._request("/queue", {"delete": [answer["prompt_id"]]})
            raise GraphError(sentences)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 600.0, on_event: Callable[[str, dict], None] | None = None) -> None:
        """Follow the websocket until `prompt_id` has run. `on_event(type, data)` sees every message on the way.

        Raises GraphError with the sentence of the node that failed or that the run was interrupted, TimeoutError after
        `seconds`, ServerError if the server is gone.
        """
        deadline = time.monotonic() + seconds
        while prompt_id not in self._ended:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ComfyUI did not finish the graph within {seconds:.0f} seconds.")
            event = _event_of(self._receive())
            if event is None:
                continue
            if on_event:
                on_event(event["type"], event["data"])
            self._note_end(event["type"], event["data"])
        faults = self._ended.pop(prompt_id)
        if faults:
            raise GraphError(faults)

    def _receive(self) -> str | bytes:
        """The next message of the websocket; empty where none comes within a second."""
        import websocket

        self._socket.settimeout(1.0)
        try:
            return self._socket.recv()
        except websocket.WebSocketTimeoutException:
            self._alive()
            return ""
        except (websocket.WebSocketException, OSError) as error:
            self._alive()
            raise ServerError(f"The connection to ComfyUI at {self.address} broke: {error}") from error

    def _note_end(self, kind: str, data: dict) -> None:
        """Remember that a run has ended, and with which faults."""
        if kind == "execution_success":
            self._ended[data["prompt_id"]] = []
        elif kind == "execution_interrupted":
            self._ended[data["prompt_id"]] = [f"{data.get('node_type', 'The run')} was interrupted."]
        elif kind == "execution_error":
            text = str(data.get("exception_message", "")).strip()
            self._ended[data["prompt_id"]] = [f"{data.get('node_type')} (node {data.get('node_id')}): {text}"]

    def history(self, prompt_id: str) -> dict:
        """What ComfyUI recorded of a finished run: {"outputs": {node id: {"images": [...]}}, "status": ..., ...}."""
        # ComfyUI says "success" a moment before it writes the record down.
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            record = self.get(f"/history/{prompt_id}").get(prompt_id)
            if record:
                return record
            time.sleep(0.02)
        return {}

    def pictures(self, prompt_id: str) -> dict[str, list[dict]]:
        """The saved pictures of a finished run by node id, each {"filename", "subfolder", "type"}; no previews."""
        outputs = self.history(prompt_id).get("outputs", {})
        saved = {
            node_id: [image for image in output.get("images", ()) if image["type"] == "output"]
            for node_id, output in outputs.items()
        }
        return {node_id: images for node_id, images in saved.items() if images}

    def run(self, graph: dict, seconds: float = 600.0) -> dict[str, list[dict]]:
        """Queue, wait, and return pictures()."""
        prompt_id = self.queue(graph)
        self.wait(prompt_id, seconds)
        return self.pictures(prompt_id)

    def picture(self, picture: dict) -> bytes:
        """The file of one entry of pictures(), as the server hands it out."""
        return self._request("/view?" + urllib.parse.urlencode(picture))

    def interrupt(self) -> None:
        self._request("/interrupt", {})


def _event_of(message: str | bytes) -> dict | None:
    """{"type", "data"} of a message of the websocket; None for preview pictures and for no message."""
    if not message or (isinstance(message, bytes) and message[:4] != TEXT_EVENT):
        return None
    if isinstance(message, str):
        event = json.loads(message)
        return {"type": event["type"], "data": event.get("data") or {}}
    # A text that a node shows: the length of the node's id, the id, the text.
    (length,) = struct.unpack(">I", message[4:8])
    text = message[8 + length :].decode()
    return {"type": "progress_text", "data": {"node": message[8 : 8 + length].decode(), "text": text}}


def remove_base(base: Path) -> None:
    """Remove a temporary base directory; the link to the pack is taken away first so that nothing follows it."""
    link = base / "custom_nodes" / PACK_NAME
    if link.is_symlink():
        link.unlink()
    shutil.rmtree(base, ignore_errors=True)
