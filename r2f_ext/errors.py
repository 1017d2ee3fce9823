"""The one exception that users are meant to read, untrusted text made fit for its sentence, and errors of memory."""

from __future__ import annotations


class R2FError(Exception):
    """Bad input or an impossible request, described in one sentence that names the thing and the remedy.

    The command line prints it without a traceback and exits with code 2. The message is one line: characters that a
    terminal would obey (line breaks, escapes, marks of writing direction, lone surrogates) become `?`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_printable(str(message)))


def plain(text: object, limit: int = 120) -> str:
    """Text from a file or a path, safe to stand within a sentence: one line, and at most about `limit` characters.

    What is longer is cut with the cut said: `name that goes on... (5000 characters)`. HTML is escaped by the page.
    """
    shown = str(text)
    cut = shown if len(shown) <= limit else f"{shown[:limit]}... ({len(shown)} characters)"
    return _printable(cut)


def listed(names: list[str], limit: int = 8) -> str:
    """Names joined by commas, each made `plain`; beyond `limit` of them only their number is said."""
    shown = ", ".join(plain(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def reason(error: Exception, limit: int = 200) -> str:
    """What another library's exception says, on one line and without a full stop, to stand within a sentence."""
    return plain(" ".join(str(error).split()), limit).rstrip(".") or type(error).__name__


# Messages of the CPU and CUDA allocators; torch.OutOfMemoryError is a RuntimeError with the first of them.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised the error."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def expected(error: Exception) -> str:
    """The sentence on an error that input, memory or a singular matrix caused; any other error is raised again."""
    if isinstance(error, R2FError):
        return str(error)
    if out_of_memory(error):
        return "out of memory."
    if type(error).__name__.lstrip("_") == "LinAlgError":  # of torch, numpy and scipy, which are not imported here
        return f"a matrix cannot be decomposed ({reason(error)})."
    raise error
