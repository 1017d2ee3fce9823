"""One search after another: what is said of each, and that a run goes on where it was killed."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from route_cases import posed

from r2f_ext.inversion import searches as module
from r2f_ext.inversion.exactness import Bound, exactness_of
from r2f_ext.inversion.newton import Search
from r2f_ext.inversion.routes import run_routes, verdicts_of
from r2f_ext.inversion.saved_searches import SavedSearches, SearchFiles
from r2f_ext.inversion.searches import one_by_one, search_each
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.progress import Stages
from r2f_ext.types import Reconstruction

TESTS = Path(__file__).resolve().parents[1]
START = Reconstruction("given", torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 2]), "", 0.0)
# Victim 1 is solved and bounded, 2 is solved without a bound, 3 is not solved.
RESIDUALS = (2e-6, 3e-6, 0.05)
BOUNDS = (Bound(58.2, 0, 1.0), Bound(float("nan"), 4, 1.0))


class Script:
    """Searches with given results; `searched` and `judged` list the victims that were."""

    def __init__(self):
        self.searched, self.judged, self.said = [], [], []

    def find(self, victim, start, label):
        self.searched.append(victim)
        assert int(label) == victim and torch.equal(start, torch.full((4,), 0.5))
        return Search(torch.full((4,), 0.25 * victim), RESIDUALS[victim], 0.1, 5, seconds=7.0)

    def bound(self, victim, image, label):
        self.judged.append(victim)
        return BOUNDS[victim]

    def advance(self, units, line=""):
        self.said.append((units, line))

    def run(self, files=None):
        return search_each("gauss_newton", START, one_by_one(self.find), self.bound, self.advance, files=files)


def test_every_search_is_told_with_its_residual_and_how_many_are_exact_so_far():
    script = Script()
    found = script.run()
    assert script.said == [
        (1, "search 1 of 3 (victim 1): residual 2.0e-06, exact to 58 dB; 1 exact so far"),
        (1, "search 2 of 3 (victim 2): residual 3.0e-06, not exact; 1 exact so far"),
        (1, "search 3 of 3 (victim 3): residual 5.0e-02, not exact; 1 exact so far"),
    ]
    assert found.per_victim["exact"].tolist() == [1, 0, 0] and script.judged == [0, 1]
    assert found.images.mean((1, 2, 3)).tolist() == [0, 0.25, 0.5]


def test_a_rerun_takes_what_had_ended_and_judges_it_anew(tmp_path):
    files = SearchFiles(tmp_path, "gauss_newton", ("a" * 64, "b" * 64, "c" * 64))
    first = Script().run(files)
    files.path(1).unlink()
    again = Script()
    found = again.run(files)
    assert again.searched == [1] and sorted(again.judged) == [0, 1]
    assert torch.equal(found.images, first.images) and found.details == first.details
    assert [line.endswith("; it had ended in an earlier run") for _, line in again.said] == [True, True, False]
    assert [line.split(":")[0] for _, line in again.said] == [
        "search 1 of 3 (victim 1)",
        "search 2 of 3 (victim 3)",
        "search 3 of 3 (victim 2)",
    ]
    assert found.per_victim.keys() == first.per_victim.keys()
    assert found.per_victim["passes"].tolist() == [5, 5, 5]
    assert found.per_victim["search_seconds"].tolist() == [7, 7, 7]


def test_searches_may_end_in_any_order():
    """Figures and images stand at their victims; lines tell them as they end."""
    script = Script()

    def backwards(victims, points, labels):
        for victim in reversed(victims):
            yield victim, script.find(victim, points[victim], labels[victim])

    found = search_each("gauss_newton", START, backwards, script.bound, script.advance)
    expected = Script().run()
    assert torch.equal(found.images, expected.images)
    for name, values in expected.per_victim.items():
        torch.testing.assert_close(found.per_victim[name], values, equal_nan=True)
    assert [line[:21] for _, line in script.said] == [f"search {n} of 3 (victim" for n in (1, 2, 3)]
    assert [line[22] for _, line in script.said] == ["3", "2", "1"]
    assert [line[-14:] for _, line in script.said] == ["0 exact so far", "0 exact so far", "1 exact so far"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_processes_that_share_the_victims_change_nothing(tmp_path, monkeypatch):
    """The searches run elsewhere; figures, images, lines and files are the same."""
    asked = []
    monkeypatch.setattr(module, "processes_for", lambda *given: asked.append(given) or 2)
    alone, files = Script(), SearchFiles(tmp_path, "gauss_newton", ("a" * 64, "b" * 64, "c" * 64))
    expected, script = alone.run(), Script()
    found = search_each("gauss_newton", START, one_by_one(script.find), script.bound, script.advance, None, files, 99)
    assert not script.searched and not script.judged and asked == [(3, 99)]
    assert torch.equal(found.images, expected.images) and (found.why, found.details) == (expected.why, expected.details)
    for name, values in expected.per_victim.items():
        torch.testing.assert_close(found.per_victim[name], values, equal_nan=True)
    assert sorted(line.split("(")[1].split(";")[0] for _, line in script.said) == sorted(
        line.split("(")[1].split(";")[0] for _, line in alone.said
    )
    files.path(1).unlink()
    again = Script()
    kept = search_each("gauss_newton", START, one_by_one(again.find), again.bound, again.advance, None, files, 99)
    assert torch.equal(kept.images, expected.images) and asked[1:] == [(1, 99)]
    assert sum(line.endswith("; it had ended in an earlier run") for _, line in again.said) == 2
    assert files.read(1, START.images[1].flatten()) is not None


def test_searches_that_are_left_are_spread_over_the_processes():
    search = Search(torch.zeros(4), 0.0, 0.1, 1)
    assert module._groups([None] * 3, [0, 1, 2], 1) == [[0, 1, 2]]
    assert module._groups([None] * 9, list(range(9)), 2) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert [len(group) for group in module._groups([None] * 70, list(range(70)), 2)] == [8] * 8 + [6]
    kept = [search, None, search, None]
    assert module._groups(kept, [1, 3], 2) == [[1], [3], [0], [2]]
    assert module._groups([search, search], [], 2) == [[0], [1]]


def test_a_damaged_file_is_named_and_searched_anew(tmp_path):
    files = SearchFiles(tmp_path, "gauss_newton", ("a" * 64, "b" * 64, "c" * 64))
    Script().run(files)
    files.path(2).write_bytes(b"{}")
    SearchFiles(tmp_path, "gauss_newton", ("d" * 64,)).write(0, Search(torch.zeros(4), 0.0, 0.1, 1))
    again = Script()
    again.run(files)
    assert again.searched == [2]
    assert again.said[0] == (0, "1 kept search is of other adapters, images, settings or code and is not used")
    assert again.said[-1][1].endswith(f"; searched anew, because its file '{files.path(2).name}' is unreadable")
    assert files.read(2, START.images[2].flatten()) is not None


def test_a_search_that_cannot_be_kept_goes_on(tmp_path):
    files = SearchFiles(tmp_path / "gone", "gauss_newton", ("a" * 64, "b" * 64, "c" * 64))
    script = Script()
    found = script.run(files)
    assert len(found.images) == 3 and all("; not kept: cannot write" in line for _, line in script.said)


PROGRAM = """
import sys
from pathlib import Path
from test_searches import searched
searched(Path(sys.argv[1]), lambda line: print(line, flush=True))
"""


class Heard:
    """A listener that hands on the lines of a stage."""

    def __init__(self, say):
        self.say = say

    def start(self, stage, total):
        return lambda units, line="": self.say(line) if line else None

    def finish(self, stage, completed):
        pass


def searched(folder, say):
    """Two victims by the route gauss_newton, two passes each, their searches kept in a folder."""
    problem, _ = posed()
    problem = replace(problem, saved=SavedSearches(folder, "test"), gauss_newton=GaussNewtonConfig(passes=2))
    return run_routes(problem, verdicts_of(problem), ["gauss_newton"], Stages(Heard(say))).reconstructions[-1]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "inversion")])
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert program.stdout is not None and program.stdout.readline().startswith("search 1 of 2 (victim ")
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    assert len(list(tmp_path.glob("search-gauss_newton-*.safetensors"))) >= 1
    said = []
    found = searched(tmp_path, said.append)
    assert any(line.endswith("it had ended in an earlier run") for line in said) and len(said) == 2
    (tmp_path / "new").mkdir()
    afresh = searched(tmp_path / "new", said.append)
    torch.testing.assert_close(found.per_victim["residual"], afresh.per_victim["residual"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.images, afresh.images, rtol=1e-3, atol=1e-3)


def test_a_search_that_its_time_limit_stopped_is_told(tmp_path):
    """On its line, in `why`, in the words on exactness, and after it was kept."""
    script, files = Script(), SearchFiles(tmp_path, "gauss_newton", ("a" * 64, "b" * 64, "c" * 64))
    found_by = script.find
    script.find = lambda victim, *rest: replace(found_by(victim, *rest), stopped=victim == 2)
    for _ in range(2):
        found = script.run(files)
        assert (
            "search 3 of 3 (victim 3): residual 5.0e-02, not exact, stopped by the time limit; 1 exact"
            in script.said[-1][1]
        )
        assert "the time limit stopped 1 of 3 searches" in found.why
        assert exactness_of(found, 2).words == "not exact: the residual is 0.05 where the time limit stopped the search"
    assert script.searched == [0, 1, 2]
    assert "time limit" not in Script().run().why
