"""The exception whose message users read, functions that make text safe for it, and the test for lack of memory."""

from __future__ import annotations


class R2FError(Exception):
    """Bad input or an impossible request, described in one sentence that names the thing and the remedy.

    The command line prints it without a traceback and exits with code 2. The message is one line: characters that a
    terminal would interpret (line breaks, escape sequences, bidirectional controls, lone surrogates) become `?`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_printable(str(message)))


def plain(text: object, limit: int = 120) -> str:
    """Text from a file or a path, made safe to be part of a sentence: one line of at most about `limit` characters.

    A longer text is cut, and the result says so: `name that goes on... (5000 characters)`. The page escapes HTML.
    """
    shown = str(text)
    cut = shown if len(shown) <= limit else f"{shown[:limit]}... ({len(shown)} characters)"
    return _printable(cut)


def listed(names: list[str], limit: int = 8) -> str:
    """Names joined by commas, each made `plain`. Names after the first `limit` are only counted."""
    shown = ", ".join(plain(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def reason(error: BaseException, limit: int = 200) -> str:
    """The message of another library's exception as part of a sentence: on one line, without a full stop."""
    return plain(" ".join(str(error).split()), limit).rstrip(".") or type(error).__name__


# Messages of the CPU and CUDA allocators; torch.OutOfMemoryError is a RuntimeError with the first of them.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised the error."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def expected(error: Exception) -> str:
    """A sentence on an error that input, lack of memory or a singular matrix caused; other errors are raised again."""
    if isinstance(error, R2FError):
        return str(error)
    if out_of_memory(error):
        return "out of memory."
    if type(error).__name__.lstrip("_") == "LinAlgError":  # of torch, numpy and scipy, which are not imported here
        return f"a matrix cannot be decomposed ({reason(error)})."
    raise error
