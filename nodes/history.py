"""Liked and disliked pictures: loading them and reading them."""

from comfy_api.latest import io, ui

from ..prefgen.comfy import folders, histories
from .choices import checked, only
from .sockets import CATEGORY, MLLM, Preference, searched, shows_something


def prompts_of(pictures: list | None, prompts: list | None) -> list[str]:
    """The prompts of a list of pictures, one each. ValueError where the lists don't go together: which prompt is whose
    would be a guess."""
    if not prompts:
        return []
    count = sum(1 if picture.ndim == 3 else len(picture) for picture in pictures or [])
    if len(prompts) != count:
        raise ValueError(
            f"{count} pictures and {len(prompts)} prompts don't go together: connect both from the same Load "
            "Preference History, or leave the prompts out."
        )
    return list(prompts)


class LoadPreferenceHistory(io.ComfyNode):
    """A folder of rated pictures -> liked and disliked IMAGE lists."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_LoadPreferenceHistory",
            display_name="Load Preference History",
            category=CATEGORY,
            **searched("taste", "style", "like", "favorite", "personal"),
            description="Loads a folder of liked and disliked pictures: input/prefgen/<name>/liked and .../disliked.",
            inputs=[
                io.Combo.Input(
                    "history",
                    options=list(folders.histories()),
                    tooltip="A folder in input/prefgen with a subfolder `liked` and, optionally, `disliked` (a folder "
                    "of loose pictures counts as liked), or one of the bundled example users.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "liked",
                    display_name="liked",
                    is_output_list=True,
                    tooltip="The liked pictures, oldest first, each at its own size, up to 1024 pixels.",
                ),
                io.Image.Output(
                    "disliked",
                    display_name="disliked",
                    is_output_list=True,
                    tooltip="The disliked pictures, if there are any.",
                ),
                io.String.Output(
                    "liked_prompts",
                    display_name="liked_prompts",
                    is_output_list=True,
                    tooltip="The prompt of each liked picture, empty where nobody knows it.",
                ),
                io.String.Output(
                    "disliked_prompts",
                    display_name="disliked_prompts",
                    is_output_list=True,
                    tooltip="The prompt of each disliked picture, empty where nobody knows it.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, history):
        return checked(folders.history_of, history)

    @classmethod
    def fingerprint_inputs(cls, history):
        return folders.history_fingerprint(history)

    @classmethod
    def execute(cls, history) -> io.NodeOutput:
        return io.NodeOutput(*histories.load(folders.history_of(history)))


class EncodePreferenceHistory(io.ComfyNode):
    """Rated pictures, read by PREFGEN_MLLM, CLIP_VISION or both -> PREFGEN_PREFERENCE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_EncodePreferenceHistory",
            display_name="Encode Preference History",
            category=CATEGORY,
            **searched("taste", "style", "like", "preference", "clip vision"),
            description="The MLLM looks at all liked and disliked pictures together and works out the taste behind "
            "them; CLIP vision captures how they look. Pictures that were read before are not read again.",
            is_input_list=True,
            is_output_node=True,
            **shows_something(),
            inputs=[
                MLLM.Input(
                    "mllm",
                    optional=True,
                    tooltip="From Load Preference MLLM, for a PrefGen adapter. An IP-Adapter needs only clip_vision.",
                ),
                io.Image.Input(
                    "liked",
                    tooltip="Pictures you like, as a batch or a list, in any size. One is enough; eight are better.",
                ),
                io.Image.Input(
                    "disliked", optional=True, tooltip="Pictures you don't like, as many as you want. Optional."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The CLIP vision model that the adapter was trained with. It adds the image part of the "
                    "user; for an IP-Adapter it is all you need.",
                ),
                io.String.Input(
                    "liked_prompts",
                    optional=True,
                    force_input=True,
                    tooltip="What the liked pictures were asked for, from Load Preference History: then the MLLM can "
                    "tell your taste from what you asked for. Leave it out for an MLLM that was tuned without prompts, "
                    "as the atelier's was.",
                ),
                io.String.Input(
                    "disliked_prompts",
                    optional=True,
                    force_input=True,
                    tooltip="The same for the disliked pictures.",
                ),
            ],
            outputs=[Preference.Output(display_name="PREFGEN_PREFERENCE", tooltip="For Fuse User Vector.")],
        )

    @classmethod
    def execute(
        cls, liked, mllm=None, disliked=None, clip_vision=None, liked_prompts=None, disliked_prompts=None
    ) -> io.NodeOutput:
        from ..prefgen.comfy.encoding import encode_history
        from ..prefgen.history import PreferenceHistory, montage

        history = PreferenceHistory.from_images(
            liked, disliked or [], prompts_of(liked, liked_prompts), prompts_of(disliked, disliked_prompts)
        )
        encoded = encode_history(history, only(mllm, "mllm"), only(clip_vision, "clip_vision"))
        return io.NodeOutput(encoded, ui=ui.PreviewImage(montage(history), cls=cls))
