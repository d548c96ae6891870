"""Everything fastad raises on purpose, so that callers can catch one family."""

__all__ = ["EngineError", "FastadError", "FastadWarning", "InputError", "UnsupportedError"]


class FastadError(Exception):
    """Base of all errors that fastad raises on purpose."""


class InputError(FastadError, ValueError):
    """The caller passed something that cannot be used: an image, an argument, a folder."""


class UnsupportedError(FastadError):
    """The request is well formed and not possible here: a runtime, a precision, an operator."""


class EngineError(FastadError):
    """An engine file, a checkpoint or the machine that should run it is at fault."""


class FastadWarning(UserWarning):
    """Something works and differs from what was asked for."""
