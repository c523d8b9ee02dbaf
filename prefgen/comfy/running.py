"""The server that ComfyUI runs in this process, where it runs one: tests and scripts use its classes without."""

from __future__ import annotations

import sys


def prompt_server():
    """ComfyUI's PromptServer, None where none is running. Never imports it: it is there before any pack is loaded."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
