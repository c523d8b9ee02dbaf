"""The pack's nodes: schemas and calls into prefgen."""

from comfy_api.latest import ComfyExtension, io

from ..prefgen.comfy import folders, provenance, routes
from ..prefgen.comfy.running import prompt_server
from .atelier import LoadAtelier
from .describe import DescribePreference
from .history import EncodePreferenceHistory, LoadPreferenceHistory
from .look import LookAtPictures
from .mllm import LoadPreferenceMLLM
from .sheet import LabelledSheet
from .taste import ApplyTaste
from .user import ApplyUserCrossAttention, FuseUserVector
from .users import BlendUsers, LoadUser, SaveUser


class PrefGenExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # ComfyUI 0.3.75 asks a pack for its nodes and for nothing else: routes are added here, once.
        server = prompt_server()
        if server is not None:
            routes.register(server)
            provenance.register(server)
            folders.make_folders()
        return [
            ApplyTaste,
            LoadPreferenceMLLM,
            LoadPreferenceHistory,
            EncodePreferenceHistory,
            FuseUserVector,
            ApplyUserCrossAttention,
            DescribePreference,
            LoadAtelier,
            LookAtPictures,
            SaveUser,
            LoadUser,
            BlendUsers,
            LabelledSheet,
        ]
