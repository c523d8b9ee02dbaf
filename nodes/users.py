"""Users as files, and users mixed."""

from comfy_api.latest import io

from ..prefgen.comfy import folders
from .choices import checked
from .sockets import CATEGORY, User, searched

SLOTS = 4


class SaveUser(io.ComfyNode):
    """PREFGEN_USER -> a file in models/prefgen/users."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_SaveUser",
            display_name="Save User",
            category=CATEGORY,
            **searched("taste", "profile", "save style", "share"),
            description="Saves a user as one small file without any pictures: a taste made ready for one adapter, to "
            "load, to mix or to pass on.",
            inputs=[
                User.Input("user", tooltip="From Fuse User Vector or Blend Users."),
                io.String.Input(
                    "name",
                    default="my taste",
                    tooltip="The file's name in models/prefgen/users. A user of that name that is another one stays: "
                    "the new one gets a number.",
                ),
                io.String.Input(
                    "taste",
                    default="",
                    optional=True,
                    tooltip="What the user is made of, for your own memory, such as sea@1a2b3c4d. It is said where the "
                    "file's adapter is missing.",
                ),
            ],
            outputs=[User.Output(display_name="PREFGEN_USER", tooltip="The same user.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, user, name, taste="") -> io.NodeOutput:
        folders.save_user_as(user, name, taste)
        return io.NodeOutput(user)


class LoadUser(io.ComfyNode):
    """A file in models/prefgen/users -> PREFGEN_USER."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_LoadUser",
            display_name="Load User",
            category=CATEGORY,
            **searched("taste", "profile", "load style"),
            description="Loads a user that Save User has saved. Needs the adapter that it was made for, but neither "
            "the MLLM nor the pictures.",
            inputs=[
                io.Combo.Input(
                    "user",
                    options=list(folders.users_saved()),
                    tooltip="A file in models/prefgen/users.",
                ),
            ],
            outputs=[User.Output(display_name="PREFGEN_USER", tooltip="For Apply User Cross-Attention.")],
        )

    @classmethod
    def validate_inputs(cls, user):
        return checked(folders.user_path, user)

    @classmethod
    def fingerprint_inputs(cls, user):
        return folders.file_fingerprint(user, folders.user_path(user))

    @classmethod
    def execute(cls, user) -> io.NodeOutput:
        from ..prefgen.user_file import load_user

        return io.NodeOutput(load_user(folders.user_path(user), folders.adapters()))


class BlendUsers(io.ComfyNode):
    """Up to four PREFGEN_USERs -> one."""

    @classmethod
    def define_schema(cls):
        inputs = []
        for number in range(1, SLOTS + 1):
            inputs.append(
                User.Input(
                    f"user_{number}",
                    optional=number > 1,
                    tooltip="A user. All of them are for the same adapter."
                    if number == 1
                    else "Another user, or none.",
                )
            )
            inputs.append(
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=number > 1,
                    tooltip=f"How much user {number} counts: 3 and 1 are three quarters and a quarter.",
                )
            )
        return io.Schema(
            node_id="PrefGen_BlendUsers",
            display_name="Blend Users",
            category=CATEGORY,
            **searched("taste", "mix", "merge", "blend styles"),
            description="Mixes up to four users of one adapter into one, by weight.",
            inputs=inputs,
            outputs=[User.Output(display_name="PREFGEN_USER", tooltip="For Apply User Cross-Attention.")],
        )

    @classmethod
    def execute(cls, user_1, weight_1=1.0, **others) -> io.NodeOutput:
        from ..prefgen.user_file import blend_users

        users = [user_1]
        weights = [weight_1]
        for number in range(2, SLOTS + 1):
            user = others.get(f"user_{number}")
            if user is not None:
                users.append(user)
                weights.append(others.get(f"weight_{number}", 1.0))
        return io.NodeOutput(blend_users(users, weights))
