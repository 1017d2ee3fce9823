"""The command line: `r2f COMMAND`. Bad input ends in one sentence and exit code 2, Ctrl-C in 130."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from r2f_ext.cli.options import parse
from r2f_ext.errors import R2FError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parse(arguments)
    try:
        # After parsing: `--help` answers without loading torch.
        from r2f_ext import distributed
        from r2f_ext.cli import commands, display
        from r2f_ext.files import output_folder, write_text
        from r2f_ext.malloc import keep_freed_memory

        keep_freed_memory()
        warnings.filterwarnings("ignore", module="peft")
        if options.json is not None:
            if Path(options.json).is_dir():
                raise R2FError(f"--json '{options.json}' is a folder: name a file.")
            output_folder(Path(options.json).resolve().parent)
        if distributed.wanted() and options.command not in commands.DISTRIBUTED:
            raise R2FError(f"only {' and '.join(commands.DISTRIBUTED)} run on several processes: leave torchrun out.")
        with distributed.processes(cuda=commands.uses_cuda(options)):
            first = distributed.rank() == 0
            display.console.quiet = not first
            printed = commands.COMMANDS[options.command](options)
            if options.json is not None and first:
                write_text(Path(options.json), json.dumps(printed, indent=1))
        return 0
    except R2FError as error:
        print(f"r2f {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"r2f {options.command}: interrupted; nothing half-written was left behind.", file=sys.stderr)
        return 130
    except MemoryError:
        print(f"r2f {options.command}: out of memory: ask for fewer pairs (--count).", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
