"""What tells a user's mistake from a bug."""


class UserError(ValueError):
    """Something that a user can mend: its text says what was given, what was expected and what to do.

    Commands show it as one sentence, servers as a refusal. Every other exception is a bug and keeps its traceback, but
    for the operating system's (`OSError`: a missing file, a full disk), which say what they are by themselves.
    """


class MissingPackage(UserError, ImportError):
    """An optional package that is asked for and not installed: its text says which extra brings it."""
