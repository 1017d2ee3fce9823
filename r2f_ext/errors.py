"""The one exception that users are meant to read, and untrusted text made fit for its sentence."""

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
