"""Combo values, which arrive from anywhere."""

from ..prefgen.comfy.folders import ChoiceError


def checked(resolve, name) -> bool | str:
    """True, or the sentence that says why a combo value stands for nothing."""
    try:
        resolve(name)
    except ChoiceError as error:
        return str(error)
    return True
