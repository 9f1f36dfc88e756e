"""The errors a caller can meet: each message is one sentence, what is wrong and what would be right."""


class InputError(ValueError):
    """The caller's input is wrong (a value, a file, a name); the command exits with 2."""


class MissingExtraError(ImportError):
    """An optional library is absent; the message names the extra that brings it."""


class NumericError(ArithmeticError):
    """A component produced NaN or Inf; the message names the component and the remedy."""
