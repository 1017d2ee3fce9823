"""Bounds the time that a regular expression from a file of unknown origin can take on the name of a module."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from math import comb, prod

from r2f_ext.errors import R2FError, plain

NAME_LENGTH = 48  # characters of a long module path
MAX_COST = 1_000_000  # steps of backtracking for one name, about 10 ms
MAX_LENGTH = 1000


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Refuse patterns that are not valid or could take long on a module's name.

    Args:
        patterns: regular expressions of Python's `re`; where: the file and field, for the message.

    Raises:
        R2FError: a pattern is invalid, or the bound on the steps of all patterns together exceeds `MAX_COST`.
    """
    cost = 0
    for pattern in patterns:
        try:
            _compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            reason = plain(error) if isinstance(error, re.error) else "too large"
            raise R2FError(
                f"{where} holds '{plain(pattern)}', which is no regular expression ({reason}): name the modules."
            ) from error
        cost += steps(pattern)
        if cost > MAX_COST:
            raise R2FError(
                f"{where} holds '{plain(pattern)}', a regular expression that could search for minutes: "
                "list the names of the modules instead."
            )


def _compile(pattern: str) -> None:
    """Compile a pattern as PEFT will, unless it is so long that this alone takes seconds."""
    if len(pattern) <= MAX_LENGTH:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of syntax that a later Python may read otherwise
            re.compile(pattern)


def steps(pattern: str) -> int:
    """An upper bound on the backtracking steps of `pattern` on one module name.

    Each of k repeats can end at any of the n characters, comb(n + k, k) ways together, and each group tries its
    branches. A repeated group may itself contain repeats, which takes exponential time: it counts as exceeding any
    bound, as does a pattern of more than `MAX_LENGTH` characters.
    """
    if len(pattern) > MAX_LENGTH:
        return MAX_COST + 1
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\.", "c", pattern))  # no escapes, no classes
    if re.search(r"\)[*+{]", bare):
        return MAX_COST + 1
    repeats = len(re.findall(r"[*+]|\{\d*,?\d*\}|(?<![*+?}(])\?", bare))
    branches, stack = [1], [0]
    for character in bare:
        if character == "(":
            branches.append(1)
            stack.append(len(branches) - 1)
        elif character == ")" and len(stack) > 1:
            stack.pop()
        elif character == "|":
            branches[stack[-1]] += 1
    return comb(NAME_LENGTH + repeats, repeats) * prod(branches)
