"""Exceptions for mistakes of the user. Commands show them without a traceback."""

__all__ = ["UnreadableImageError", "UsageError"]


class UsageError(ValueError):
    """A value from the user breaks a rule.

    The message has the form ``"<where>: expected <argument> <rule>, got <value>[; hint]"``.
    Commands print only this and exit with status 2.
    """


class UnreadableImageError(UsageError):
    """An image file is damaged or is not an image. It may be skipped, but never silently."""
