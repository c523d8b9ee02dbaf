"""PrefGen for ComfyUI: the entry point and the front-end folder, nothing else."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import PrefGenExtension

    return PrefGenExtension()
