"""What a person can mend."""


class MendableError(Exception):
    """One sentence: what is wrong, with which file, node or key, and what to do."""
