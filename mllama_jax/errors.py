"""The one exception for bad input."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, expected, got, what to do."""
