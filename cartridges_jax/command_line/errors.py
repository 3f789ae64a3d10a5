"""These classes tell a user's mistake from a bug."""


class UserError(ValueError):
    """A mistake that a user can mend: the text says what was given, what was expected and what to do.

    Commands show it as one sentence, and servers as a refusal. Every other exception is a bug and keeps its traceback,
    except `OSError` (a missing file, a full disk), whose own text says enough.
    """


class MissingPackage(UserError, ImportError):
    """An optional package is needed and not installed: the text says which extra brings it."""
