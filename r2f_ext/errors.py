"""The one exception that users are meant to read."""


class R2FError(Exception):
    """Bad input or an impossible request, described in one sentence that names the thing and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
