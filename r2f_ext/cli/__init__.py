"""The command line: `r2f COMMAND`.

Exit codes: 2 for bad input, which is explained in one sentence; 3 for an audit whose report judges nothing because a
stage failed, or for a study of which some settings could not be measured; 70 for an error of the program itself; 130
for Ctrl-C; 143 for SIGTERM.
"""

from __future__ import annotations

import importlib
import sys
import warnings

from r2f_ext.cli.checks import check
from r2f_ext.cli.failures import escape_what_the_terminal_cannot_show, report_failure, sigterm_as_interrupt
from r2f_ext.cli.options import parse


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    escape_what_the_terminal_cannot_show()
    options = parse(arguments)
    try:
        with sigterm_as_interrupt(), warnings.catch_warnings():
            check(options)
            warnings.filterwarnings("ignore", module="peft")
            # Imported here, so that the help and most error messages appear without loading torch.
            return int(importlib.import_module("r2f_ext.cli.execute").execute(options))
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error, options)


if __name__ == "__main__":
    sys.exit(main())
