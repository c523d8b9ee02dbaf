"""The pack's nodes: schemas and calls into prefgen."""

from comfy_api.latest import ComfyExtension, io

from .atelier import LoadAtelier
from .describe import DescribePreference
from .history import EncodePreferenceHistory, LoadPreferenceHistory
from .mllm import LoadPreferenceMLLM
from .user import ApplyUserCrossAttention, FuseUserVector


class PrefGenExtension(ComfyExtension):
    async def on_load(self) -> None:
        from server import PromptServer

        from ..prefgen.comfy import routes

        if getattr(PromptServer, "instance", None) is not None:
            routes.register(PromptServer.instance)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadPreferenceMLLM,
            LoadPreferenceHistory,
            EncodePreferenceHistory,
            FuseUserVector,
            ApplyUserCrossAttention,
            DescribePreference,
            LoadAtelier,
        ]
