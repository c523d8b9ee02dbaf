"""What a person can mend."""


class DataError(Exception):
    """Bad input or a full disk, in one sentence: what, which file, what to do."""
