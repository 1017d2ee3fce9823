"""Untrusted text within a sentence."""

import numpy
import pytest
import scipy
import torch

from r2f_ext.errors import R2FError, expected, listed, plain


def test_plain_text_stays_and_the_rest_becomes_printable():
    assert plain("blocks.0 é (x)") == "blocks.0 é (x)"
    assert plain("a\nb\r\t\x1b[31m\u202e\u2028\udc80\x00") == "a?b???[31m????"
    assert plain(["a\n"]) == "['a\\n']"


def test_a_cut_is_said_and_a_name_that_fits_is_never_cut():
    assert plain("x" * 120) == "x" * 120
    assert plain("x" * 5000) == "x" * 120 + "... (5000 characters)"
    assert plain("x" * 5000, 10) == "x" * 10 + "... (5000 characters)"


def test_lists_say_how_many_more():
    assert listed(["a", "b\n"]) == "a, b?"
    assert listed([str(i) for i in range(20)], 3) == "0, 1, 2 and 17 more"


def test_every_message_is_one_printable_line():
    assert str(R2FError("a\nb\x1b[0m")) == "a?b?[0m"
    assert str(R2FError(ValueError("x"))) == "x"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (R2FError("no such thing."), "no such thing."),
        (MemoryError(), "out of memory."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory."),
        (numpy.linalg.LinAlgError("SVD did not\nconverge."), "a matrix cannot be decomposed (SVD did not converge)."),
        (scipy.linalg.LinAlgError("Singular matrix"), "a matrix cannot be decomposed (Singular matrix)."),
        (torch.linalg.LinAlgError("linalg.eigh: failed"), "a matrix cannot be decomposed (linalg.eigh: failed)."),
    ],
)
def test_errors_of_input_memory_and_numbers_have_a_sentence(error, sentence):
    assert expected(error) == sentence


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shapes differ"), KeyError("x")])
def test_a_bug_is_raised_again(error):
    with pytest.raises(type(error)) as raised:
        expected(error)
    assert raised.value is error
