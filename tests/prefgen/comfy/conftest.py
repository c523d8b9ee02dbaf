"""The tests of prefgen.comfy run inside ComfyUI."""

from tests.comfyui import pack  # noqa: F401
