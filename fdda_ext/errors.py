"""The exceptions that stand for a mistake of the user, and so are shown without a traceback."""

__all__ = ["UnreadableImageError", "UsageError"]


class UsageError(ValueError):
    """A value the user gave breaks a rule.

    The message is one sentence of the form
    ``"<where>: expected <argument> <rule>, got <value>[; hint]"``; the command lines print it
    alone and exit with status 2.
    """


class UnreadableImageError(UsageError):
    """A file that should be an image is none, or is damaged: it may be left out, never silently."""
