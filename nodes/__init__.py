"""The pack's nodes: schemas and calls into prefgen."""

from comfy_api.latest import ComfyExtension, io

from .atelier import LoadAtelier
from .describe import DescribePreference
from .history import EncodePreferenceHistory, LoadPreferenceHistory
from .mllm import LoadPreferenceMLLM
from .user import ApplyUserCrossAttention, FuseUserVector


class PrefGenExtension(ComfyExtension):
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
