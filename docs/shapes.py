"""Griffe extension for `make docs`: docstrings show tensor shapes, and each object on one page."""

import re
from typing import Any

from griffe import Extension, Module, Object

CODE = re.compile(r"(`[^`]*`)")


class PlainBrackets(Extension):
    """Escape `[` outside code, because Markdown reads `x[l] [P, N, d]` as a link; omit re-exported names."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            parts = CODE.split(obj.docstring.value)
            obj.docstring.value = "".join(p if p.startswith("`") else p.replace("[", "\\[") for p in parts)

    def on_module(self, *, mod: Module, **kwargs: Any) -> None:
        if mod.is_init_module and mod.exports is not None:
            mod.exports = [n for n in mod.exports if str(n) in mod.members and not mod.members[str(n)].is_alias]
