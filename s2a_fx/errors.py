"""What s2a_fx raises. Every message says what was got, what was wanted, and what to do."""


class S2AError(Exception):
    """Base of every error of this package; the command line prints it and exits with status 2."""


class S2AWarning(UserWarning):
    """Something works, but most likely not as wanted; the command line prints it in one line."""


class InputError(S2AError, ValueError):
    """An argument is not usable: a model, its inputs, a recipe's name, a pass's option."""


class UnreadableImage(InputError):
    """An image of a data set cannot be read. Processes that load images put a traceback before the message: it is left out."""

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class TraceError(S2AError, RuntimeError):
    """The model cannot be turned into a graph."""


class PassError(S2AError, RuntimeError):
    """A pass cannot be applied to this graph."""


class ShapeError(S2AError, RuntimeError):
    """A rewritten module got an input of another size than the one it was built for."""


class AdapterError(S2AError, RuntimeError):
    """A task file cannot be read or written, or does not fit the model."""
