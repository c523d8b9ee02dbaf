"""Combo values, which arrive from anywhere."""


def checked(resolve, name) -> bool | str:
    """True, or the sentence that says why a combo value stands for nothing."""
    try:
        resolve(name)
    except ValueError as error:
        return str(error)
    return True
