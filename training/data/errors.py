"""What is wrong with a data set."""

from prefgen.errors import MendableError


class DataError(MendableError):
    """Bad input or a full disk, in one sentence: what, which file, what to do."""
