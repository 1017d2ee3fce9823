"""Stages are timed, announced and closed, whatever happens in them."""

import pytest

from r2f_ext import progress
from r2f_ext.progress import Stages


class Listener:
    def __init__(self):
        self.heard = []

    def start(self, stage, total):
        self.heard.append(("start", stage, total))
        return lambda units: self.heard.append(("advance", stage, units))

    def finish(self, stage, completed):
        self.heard.append(("finish", stage))


def test_a_stage_is_announced_under_its_prefix_and_timed_without(monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    listener = Listener()
    stages = Stages(listener, "p: ")
    for _ in range(2):
        with stages.stage("pairs", 5) as advance:
            advance(5)
    assert listener.heard[:3] == [("start", "p: pairs", 5), ("advance", "p: pairs", 5), ("finish", "p: pairs")]
    assert stages.seconds == {"pairs": 3.5}


def test_a_stage_is_closed_on_failure():
    listener = Listener()
    stages = Stages(listener)
    with pytest.raises(KeyboardInterrupt), stages.stage("pairs"):
        raise KeyboardInterrupt
    assert listener.heard[-1] == ("finish", "pairs") and "pairs" in stages.seconds
