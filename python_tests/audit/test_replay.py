"""A report repeats itself: from its own folder, wherever that was moved together with what it names."""

import json
import shutil

import pytest
from cases import victim
from cli_cases import few_steps, refused, run

from r2f_ext.audit import audit, replay
from r2f_ext.audit.replay import largest_change_db
from r2f_ext.config import AuditConfig
from r2f_ext.errors import R2FError
from r2f_ext.inversion.matching import MatchingConfig

pytestmark = pytest.mark.usefixtures("few_controls")

STEPS = MatchingConfig(steps=2, seed=4)
CONFIG = AuditConfig(pairs=60, decoder_pairs=40, held_out=10, matching=STEPS, refinement=STEPS, seed=3)


@pytest.fixture(scope="module")
def recorded(few_controls, tmp_path_factory, embedded, private):
    """A folder with the report of two clients of one server, and their adapters beside it."""
    folder = tmp_path_factory.mktemp("recorded")
    adapters = [
        victim(embedded, folder / f"client{i}", private.batch([i]), private.labels[i : i + 1]) for i in range(2)
    ]
    audit(adapters, proxy="embedded", private="embedded", out=folder / "report", config=CONFIG)
    return folder


def figures(folder):
    report = json.loads((folder / "report.json").read_text())
    return {name: report[name] for name in ("reconstruction", "decoders", "config", "target", "notes")}


def same(one, other):
    """Equal to float rounding, keys and texts exactly."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == pytest.approx(other, rel=1e-4, abs=1e-4) if isinstance(one, float) else one == other


def test_the_figures_come_back(recorded, tmp_path):
    replay(recorded / "report" / "report.json", out=tmp_path)
    assert same(figures(tmp_path), figures(recorded / "report"))
    assert json.loads((tmp_path / "report.json").read_text())["config"]["matching"]["seed"] == 4


def test_folders_may_move_together_and_a_replay_can_be_replayed(recorded, tmp_path):
    moved = shutil.copytree(recorded, tmp_path / "elsewhere")
    replay(moved / "report" / "report.json", out=moved / "again")
    shutil.rmtree(moved / "report")
    report = replay(moved / "again" / "report.json")
    assert largest_change_db(json.loads((recorded / "report" / "report.json").read_text()), report.to_json()) < 0.01


def test_the_command_says_how_far_it_is_off(recorded, tmp_path, capsys, monkeypatch):
    few_steps(monkeypatch)  # a replay takes its sizes from the report
    path = recorded / "report" / "report.json"
    assert run("audit", "--replay", path, "--json", tmp_path / "again.json") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"largest change of a mean PSNR against '{path}': 0.00 dB" in shown and "see:" not in shown
    assert same(json.loads((tmp_path / "again.json").read_text())["config"], figures(path.parent)["config"])


def test_a_change_is_measured():
    def report(*psnr):
        routes = {f"r{i}": {"psnr_db_mean": value} for i, value in enumerate(psnr)}
        return {"reconstruction": {"set": {"routes": routes}}}

    assert largest_change_db(report(1.0, 5.0), report(1.5, 4.25)) == 0.75
    assert largest_change_db(report(None), report(None)) is None


def edited(recorded, to, **fields):
    data = json.loads((recorded / "report" / "report.json").read_text())
    path = to / "report.json"
    path.write_text(json.dumps({**data, **fields}))
    return path


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"schema": 3}, "has schema 3, and this version reads 1 to 2"),
        ({"inputs": None}, "a demo is repeated by r2f demo"),
        ({"inputs": {"adapters": []}}, "the inputs in .* are not what this version writes"),
        ({"config": {"seed": 0}}, "the config is not one that this version writes"),
    ],
)
def test_other_reports_are_refused(fields, sentence, recorded, tmp_path, capsys):
    path = edited(recorded, tmp_path, **fields)
    with pytest.raises(R2FError, match=sentence):
        replay(path)
    assert len(refused(capsys, "audit", "--replay", path)) > 20


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_what_is_no_report_is_refused(content, tmp_path):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(R2FError, match=r"is not a report\.json"):
        replay(path)


def test_an_adapter_that_is_gone_is_named(recorded, tmp_path):
    path = edited(recorded, tmp_path)
    with pytest.raises(R2FError, match=r"client0' does not exist"):
        replay(path)
