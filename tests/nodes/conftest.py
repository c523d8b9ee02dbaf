"""The tests of the nodes run inside ComfyUI."""

import pytest

from tests.comfyui import pack  # noqa: F401


@pytest.fixture
def progress():
    """[(done, total)] of all that moves ComfyUI's progress bar."""
    import comfy.utils

    seen = []
    hook = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda done, total, *_, **__: seen.append((done, total)))
    yield seen
    comfy.utils.set_progress_bar_global_hook(hook)
