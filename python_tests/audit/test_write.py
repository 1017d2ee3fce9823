"""An earlier report is kept until another is written, never under the names of the last run's."""

import json

import pytest

from r2f_ext.audit.write import replacing_report
from r2f_ext.errors import R2FError

REPORT = {"report.json", "report.html", "reconstructions.png", "gradients.safetensors"}
OTHERS = {"report.html.bak", "notes.txt"}
DATE = "2026-01-31T12:00:00+00:00"


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def old(tmp_path):
    """A folder with a report and other files."""
    for name in REPORT | OTHERS:
        (tmp_path / name).write_text(json.dumps({"date": DATE}) if name == "report.json" else "old")
    return tmp_path


def previous(text):
    return {f"previous-{name}" for name in text}


def test_while_the_next_report_is_made_the_old_one_has_other_names(old):
    with replacing_report(old):
        assert names(old) == previous(REPORT) | OTHERS
        (old / "report.json").write_text("new")
    assert names(old) == {"report.json"} | OTHERS and (old / "report.json").read_text() == "new"


@pytest.mark.parametrize("error", [R2FError("no."), KeyboardInterrupt(), ValueError("a bug")])
def test_a_run_that_fails_leaves_the_old_report_and_says_so(old, error):
    with pytest.raises(type(error)) as raised, replacing_report(old):
        raise error
    said = f"The report of an earlier run, of {DATE}, is kept as previous-report.json and previous-report.html."
    assert raised.value.__notes__ == [said] and names(old) == previous(REPORT) | OTHERS


def test_it_outlives_a_second_failure_and_goes_with_the_next_success(old):
    for _ in range(2):
        with pytest.raises(R2FError) as raised, replacing_report(old):
            raise R2FError("no.")
        assert len(raised.value.__notes__) == 1
    assert json.loads((old / "previous-report.json").read_text()) == {"date": DATE}
    with replacing_report(old):
        pass
    assert names(old) == OTHERS


@pytest.mark.parametrize("content", ["{", "[]", '{"date": "\\u001b[31m"}', '{"date": 3}', "[" * 100_000])
def test_a_date_that_cannot_be_read_is_not_said(old, content):
    (old / "report.json").write_text(content)
    with pytest.raises(R2FError) as raised, replacing_report(old):
        raise R2FError("no.")
    (note,) = raised.value.__notes__
    assert note.startswith("The report of an earlier run is kept as previous-report.json")


def test_without_a_report_nothing_is_renamed_or_said(tmp_path):
    (tmp_path / "gradients.safetensors").write_text("of r2f decode")
    with pytest.raises(R2FError) as raised, replacing_report(tmp_path):
        assert names(tmp_path) == {"gradients.safetensors"}
        raise R2FError("no.")
    assert not hasattr(raised.value, "__notes__") and names(tmp_path) == {"gradients.safetensors"}


def test_what_cannot_be_renamed_is_named(tmp_path, monkeypatch):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(R2FError, match=r"report\.json' is a folder.*another folder"), replacing_report(tmp_path):
        pytest.fail("the run began")
    (tmp_path / "report.json").rmdir()
    (tmp_path / "report.html").write_text("old")

    def refuse(self, other):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "replace", refuse)
    words = r"cannot rename the old '.*report\.html' \(Permission denied\)"
    with pytest.raises(R2FError, match=words), replacing_report(tmp_path):
        pytest.fail("the run began")
