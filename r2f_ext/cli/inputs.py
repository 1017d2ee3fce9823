"""The adapter that several commands read."""

from __future__ import annotations

import argparse

from r2f_ext.audit.inputs import LoadedAdapters, load_adapters
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import print_notes

Options = argparse.Namespace


def read_adapter(options: Options) -> LoadedAdapters:
    """The adapter that is named, attached to --base on --device."""
    loaded = load_adapters([options.adapter], options.base, chosen_device(options))
    print_notes(loaded.target.base.notes)
    return loaded
