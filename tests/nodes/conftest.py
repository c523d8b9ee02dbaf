"""The tests of the nodes run inside ComfyUI."""

from tests.comfyui import pack  # noqa: F401
