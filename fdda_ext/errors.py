"""The one exception that stands for a mistake of the user, and so is shown without a traceback."""

__all__ = ["UsageError"]


class UsageError(ValueError):
    """A value the user gave breaks a rule.

    The message is one sentence of the form
    ``"<where>: expected <argument> <rule>, got <value>[; hint]"``; the command lines print it
    alone and exit with status 2.
    """
