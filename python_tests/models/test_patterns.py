"""Regular expressions of a configuration: what people write passes, what can search for long does not."""

import time

import pytest

from r2f_ext.errors import R2FError
from r2f_ext.models.patterns import MAX_COST, check_patterns, steps

USUAL = (
    r"blocks\.[01]\.mlp\.fc\d",
    r"blocks\.\d+\.attn\.(qkv|proj)",
    r".*\.(attn|mlp)\.(qkv|proj|fc1|fc2)$",
    r"(.*\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])$",
    r"^vit\.encoder\.layer\.(0|1|2|3|4|5|6|7|8|9|10|11)\.attention\.attention\.(query|value)$",
    r".*(query|key|value)",
    r"(?!.*head).*fc\d",
)
SLOW = (r"(a+)+$", r"(.*)*x", r"(\w+\.?)+!", r".*.*.*.*.*.*.*.*x", "(?:.|.)?" * 40, "(a|b|.)" * 40, "(?:(a|.)|.)" * 20)


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_pass(pattern):
    check_patterns([pattern], "it")


@pytest.mark.parametrize("pattern", SLOW)
def test_slow_patterns_are_refused(pattern):
    with pytest.raises(R2FError, match="could search for minutes"):
        check_patterns([pattern], "it")


@pytest.mark.parametrize("pattern", ["(", "a{3,1}", "*", "[", "(?P<a>x)(?P<a>y)", "\\", "(" * 5000])
def test_invalid_patterns_are_refused_at_once(pattern):
    with pytest.raises(R2FError, match=r"is no regular expression|could search"):
        check_patterns([pattern], "it")


def test_many_patterns_count_together():
    with pytest.raises(R2FError, match="could search for minutes"):
        check_patterns([r".*\.x\d+"] * 10_000, "it")


def test_the_bound_bounds():
    """The dearest patterns that pass take far less than a second on a long name that does not match."""
    import re

    for pattern in (".*.*.*.*x", "(a|.)(a|.)(a|.)(a|.)(a|.)(a|.).*.*x", "a?a?a?a?aaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"):
        assert steps(pattern) <= MAX_COST
        start = time.process_time()
        re.match(pattern, "a" * 48)
        assert time.process_time() - start < 1
