"""Reads JSON that r2f itself wrote, or a base's, without torch; untrusted JSON: `models/safetensors_header.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r2f_ext.errors import R2FError


def read_json_file(path: Path, damaged: str, remedy: str) -> Any:
    """The value in a JSON file.

    Args:
        damaged: what a file that holds no JSON is, a word or two for the error; remedy: a clause.

    Raises:
        R2FError: it cannot be read, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise R2FError(f"'{path}' cannot be read ({error.strerror or error}): {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise R2FError(f"'{path}' is {damaged}: {remedy}.") from error
