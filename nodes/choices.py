"""What arrives at a node: combo values from anywhere, and lists where one thing is meant.

ComfyUI 0.3.75 checks no combo of a node of this API, newer ones those that `validate_inputs` doesn't name. So whoever
resolves a combo value refuses what was not offered: `validate_inputs` only says it before anything runs.
"""


def checked(resolve, name) -> bool | str:
    """True, or the sentence that says why a combo value stands for nothing."""
    try:
        resolve(name)
    except ValueError as error:
        return str(error)
    return True


def only(values, name: str):
    """The one thing in a list that ComfyUI hands to a node which takes lists; None for an empty list or none. Raises
    ValueError with one sentence for several: the others would be dropped without a word."""
    if values and len(values) > 1:
        raise ValueError(
            f"The input {name} takes one value, but a list of {len(values)} is connected: connect just one of them."
        )
    return values[0] if values else None
