"""Blocked products against the plain ones."""

import pytest
import torch

from r2f_ext import linalg
from r2f_ext.linalg import gram, sum_in_place


@pytest.mark.parametrize("count", [1, 6, 7, 8, 20])
def test_gram(count, monkeypatch):
    monkeypatch.setattr(linalg, "BLOCK", 7)
    rows = torch.randn(count, 5, dtype=torch.float64)
    torch.testing.assert_close(gram(rows), rows @ rows.T)
    assert torch.equal(gram(rows)[7:, :7], gram(rows)[:7, 7:].T)  # mirrored, not computed twice


def test_sum_in_place():
    terms = torch.randn(4, 3)
    torch.testing.assert_close(sum_in_place(term.clone() for term in terms), terms.sum(0))
