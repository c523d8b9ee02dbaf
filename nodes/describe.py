"""Taste in words, for models that no adapter reaches."""

from comfy_api.latest import io, ui

from ..prefgen.comfy import tastes
from .choices import checked, only
from .sockets import CATEGORY, MLLM, searched, shows_something


class DescribePreference(io.ComfyNode):
    """A taste in words: PREFGEN_MLLM and pictures -> two prompts, and both as JSON."""

    @classmethod
    def define_schema(cls):
        def traits(name, verb, prompt):
            return io.String.Input(
                name,
                multiline=True,
                default="",
                optional=True,
                tooltip=f"Your own words for what you {verb}, in place of the MLLM's; leave empty to use the MLLM's. "
                f"For the {prompt} prompt.",
            )

        return io.Schema(
            node_id="PrefGen_DescribePreference",
            display_name="Describe Preference",
            category=CATEGORY,
            **searched("taste", "style", "caption", "prompt", "words"),
            description="The MLLM puts into words what you like and dislike, for the prompts of any model, including "
            "those that no adapter reaches (SD3, Flux.2, Qwen-Image).",
            is_input_list=True,
            is_output_node=True,
            **shows_something(),
            inputs=[
                MLLM.Input(
                    "mllm",
                    lazy=True,
                    tooltip="From Load Preference MLLM. Not loaded if your own words cover everything.",
                ),
                io.Image.Input("liked", tooltip="Pictures you like, as a batch or a list, in any size."),
                io.Image.Input(
                    "disliked", optional=True, tooltip="Pictures you don't like, as many as you want. Optional."
                ),
                traits("liked_traits", "like", "positive"),
                traits("disliked_traits", "dislike", "negative"),
                io.Combo.Input(
                    "taste",
                    options=tastes.choices(),
                    default=tastes.AUTO,
                    optional=True,
                    tooltip="Whose words these are: words that you struck out in the sidebar Taste never appear, words "
                    "that you added always do, and what the MLLM understood is shown there. auto: the taste that the "
                    "pictures were read from. none: as the MLLM says it.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="liked", tooltip="For the positive prompt, next to what you want to see."
                ),
                io.String.Output(display_name="disliked", tooltip="For the negative prompt."),
                io.String.Output(display_name="json", tooltip='Both as lists: {"liked": [...], "disliked": [...]}'),
            ],
        )

    @classmethod
    def validate_inputs(cls, taste=None):
        return checked(tastes.chosen, only(taste, "taste") if isinstance(taste, list) else taste)

    @classmethod
    def fingerprint_inputs(cls, taste=None, **_):
        # New words are no new input. For auto the history's own fingerprint changes with them.
        own = tastes.chosen(only(taste, "taste") if isinstance(taste, list) else taste)
        return own.words().digest() if own else ""

    @classmethod
    def check_lazy_status(cls, disliked=None, liked_traits=None, disliked_traits=None, **_):
        pictures = any(batch is not None and len(batch) for batch in disliked or [])
        return ["mllm"] if _typed(liked_traits, disliked_traits).lacks(pictures) else []

    @classmethod
    def execute(cls, mllm, liked, disliked=None, liked_traits=None, disliked_traits=None, taste=None) -> io.NodeOutput:
        from ..prefgen.comfy.encoding import describe_history
        from ..prefgen.comfy.histories import name_of, names_of
        from ..prefgen.history import PreferenceHistory

        history = PreferenceHistory.from_images(liked, disliked or [])
        own = tastes.chosen(only(taste, "taste"), *names_of(history))

        def read():
            traits = describe_history(history, only(mllm, "mllm"))
            # Only what was said of all its pictures is said of a taste.
            tastes.understood(traits, tastes.chosen(tastes.AUTO, name_of(history)))
            return traits

        traits = _typed(liked_traits, disliked_traits).or_else(read, bool(history.disliked))
        traits = tastes.in_its_words(traits, own)
        shown = ui.PreviewText(f"liked: {traits.positive}\ndisliked: {traits.negative}")
        return io.NodeOutput(traits.positive, traits.negative, traits.to_json(), ui=shown)


def _typed(liked, disliked):
    """The artist's own words, of two inputs that ComfyUI gives as lists."""
    from ..prefgen.mllm.traits import Traits

    return Traits.typed(only(liked, "liked_traits") or "", only(disliked, "disliked_traits") or "")
