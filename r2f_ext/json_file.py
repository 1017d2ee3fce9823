"""Reads JSON of r2f itself or of a base, without torch. `models/safetensors_header.py` reads untrusted JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r2f_ext.errors import R2FError


def read_json_file(path: Path, damaged: str, remedy: str) -> Any:
    """The value in a JSON file.

    Args:
        damaged: the error's words for a file that is not JSON: "'FILE' is <damaged>".
        remedy: a clause that tells the user what to do.

    Raises:
        R2FError: it cannot be read, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise R2FError(f"'{path}' cannot be read ({error.strerror or error}): {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise R2FError(f"'{path}' is {damaged}: {remedy}.") from error
