"""Work that forked processes share: all of it is done, errors arrive, and no process outlives its use."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.func import jvp

from r2f_ext import forked
from r2f_ext.errors import R2FError
from r2f_ext.forked import processes_for, shared

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
GROUPS = [[0, 1], [2], [3, 4]]


def squares(items):
    for item in items:
        yield item, item**2


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_item_is_done_once(processes):
    found = list(shared(squares, GROUPS, processes))
    assert sorted(found) == [(n, n * n) for n in range(5)]
    if processes == 1:
        assert found == sorted(found)


def test_a_forked_process_has_one_thread_and_computes_derivatives():
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 1)).double()
    points = torch.randn(4, 6, dtype=torch.float64)

    def derivatives(items):
        for item in items:
            point = points[item].clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(point).sum(), [point], create_graph=True)
            (bent,) = torch.autograd.grad(slope.square().sum(), [point])
            yield item, os.getpid(), torch.get_num_threads(), bent, jvp(model, (points[item],), (bent,))[1].detach()

    expected = {item: values for item, *_, values in derivatives(range(4))}
    threads = torch.get_num_threads()
    found = list(shared(derivatives, [[0, 1], [2, 3]], 2))
    assert torch.get_num_threads() == threads
    assert len({pid for _, pid, *_ in found}) == 2 and os.getpid() not in {pid for _, pid, *_ in found}
    for item, _, own, _, values in found:
        assert own == 1
        torch.testing.assert_close(values, expected[item])


@pytest.mark.parametrize(
    "error", [R2FError("no such thing."), MemoryError("full"), RuntimeError("out of memory")], ids=repr
)
def test_an_error_arrives_as_it_was_raised(error):
    def failing(items):
        yield from squares(items)
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(shared(failing, GROUPS, 2))
    assert not multiprocessing.active_children()


class Strange(Exception):
    """Pickled without its second argument, so that unpickling fails."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


@pytest.mark.parametrize("error", [Strange("one", "two"), ValueError(lambda: None)], ids=["constructor", "content"])
def test_an_error_that_cannot_be_pickled_arrives_in_words(error, capfd):
    def failing(items):
        raise error
        yield

    with pytest.raises(RuntimeError) as caught:
        list(shared(failing, GROUPS, 2))
    assert str(caught.value) == f"{type(error).__name__}: {error}"
    assert "in failing" in str(caught.value.__cause__), "the traceback of the process"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("when", ["first", "between", "in the middle"])
def test_a_process_that_is_killed_is_told(when, monkeypatch):
    pickled = pickle.dumps

    def killed(items):
        if when == "first":
            os.kill(os.getpid(), signal.SIGKILL)
        yield from squares(items)

    if when == "in the middle":  # of the message: its length is sent, and not all of it
        monkeypatch.setattr(
            Connection, "send_bytes", lambda pipe, _: (os.write(pipe.fileno(), b"\0\0\1\0rest"), os._exit(1))
        )
    if when == "between":
        monkeypatch.setattr(forked.pickle, "dumps", lambda sent: pickled(sent) if sent[0] == "result" else os._exit(1))
    with pytest.raises(R2FError, match="killed, perhaps for lack of memory: use a machine with more, or set OMP_NUM"):
        list(shared(killed, GROUPS, 2))


def test_a_killed_process_that_is_sent_work_is_told():
    own, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(R2FError, match="killed"):
        forked._send(own, [0])


@pytest.mark.parametrize("most", [0, 1])
def test_with_fewer_processes_than_asked_for_all_is_done(monkeypatch, most):
    """The system refuses to fork more than `most`."""
    start, count = forked.ForkProcess.start, []

    def limited(process):
        count.append(process)
        if len(count) > most:
            raise OSError(12, "Cannot allocate memory")
        start(process)

    monkeypatch.setattr(forked.ForkProcess, "start", limited)
    assert sorted(shared(squares, GROUPS, 3)) == [(n, n * n) for n in range(5)]
    assert not multiprocessing.active_children()


def test_an_interrupt_while_processes_start_is_the_error(monkeypatch):
    def interrupted(process):
        raise KeyboardInterrupt

    monkeypatch.setattr(forked.ForkProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(shared(squares, GROUPS, 2))


def test_what_a_forked_process_writes_goes_past_a_display(monkeypatch):
    """The display's lock may have been held by a thread that the fork did not copy."""

    class Display:
        def write(self, text):
            raise AssertionError("written to the display")

        def flush(self):
            pass

    def writing(items):
        print("seen", file=sys.stderr)
        yield from squares(items)

    monkeypatch.setattr(sys, "stderr", Display())
    monkeypatch.setattr(sys, "__stderr__", open(os.devnull, "w"))  # noqa: SIM115
    assert len(list(shared(writing, GROUPS, 2))) == 5


def test_an_iterator_that_is_closed_ends_its_processes():
    def endless(items):
        yield from squares(items)
        time.sleep(600)

    results = shared(endless, GROUPS, 2)
    next(results)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert not multiprocessing.active_children()


def test_processes_are_forked_for_enough_items_and_memory(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [processes_for(items, 1) for items in (1, 3, 4, 9)] == [1, 1, 4, 4]
    monkeypatch.setattr(forked.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    assert [processes_for(9, each) for each in (17, 18, 35, 36, 101)] == [4, 3, 2, 1, 1]
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes_for(9, 1) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert processes_for(9, 1) == 1


SCRIPT = textwrap.dedent(
    """
    import os, time
    from r2f_ext.forked import shared

    def endless(items):
        yield os.getpid()
        time.sleep(600)

    for pid in shared(endless, [[0], [1]], 2):
        print(pid, flush=True)
    """
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["INT", "TERM", "KILL"])
def test_processes_end_with_their_parent(number):
    """SIGINT goes to all, as from a terminal, and the forked processes print nothing."""
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)
    else:
        parent.send_signal(number)
    errors = parent.communicate(timeout=60)[1]
    assert parent.returncode != 0
    assert errors.count("Traceback") == (1 if number == signal.SIGINT else 0)
    limit = time.monotonic() + 20 * forked.LOOK_EVERY
    while any(map(runs, pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(runs, pids))


def runs(pid):
    """A process that has ended stays a zombie where nothing waits for it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
