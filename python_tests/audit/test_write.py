"""An old report is not taken for that of a run that fails, and nothing else in its folder is touched."""

import pytest

from r2f_ext.audit.write import remove_old_report
from r2f_ext.errors import R2FError


def test_the_old_report_goes_and_all_else_stays(tmp_path):
    names = {"report.json", "report.html", "reconstructions.png"}
    others = {"gradients.safetensors", "report.html.bak", "notes.txt"}
    for name in names | others:
        (tmp_path / name).write_text("old")
    remove_old_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others
    remove_old_report(tmp_path)  # nothing left to remove


def test_what_cannot_be_removed_is_named(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(R2FError, match=r"cannot remove the old .*report\.json.*another folder"):
        remove_old_report(tmp_path)
