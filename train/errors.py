"""The two ways a run ends early that are nobody's bug."""


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and the cure. The command exits with 2."""


class Stopped(Exception):  # noqa: N818  it is not an error
    """The run was asked to stop, finished its step and saved. The command exits with 75."""
