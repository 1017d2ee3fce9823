"""`r2f env`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from r2f_ext.cli.display import console
from r2f_ext.env import environment


def run_env(options: argparse.Namespace) -> dict[str, Any]:
    information = environment()
    console.print_json(json.dumps(information))
    return information
