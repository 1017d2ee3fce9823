"""Work that forked processes share: all of it is done, errors arrive, and no process outlives its use."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

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


def test_a_process_that_is_killed_is_told():
    def killed(items):
        os.kill(os.getpid(), signal.SIGKILL)
        yield from squares(items)

    with pytest.raises(R2FError, match="killed, perhaps for lack of memory: use a machine with more, or set OMP_NUM"):
        list(shared(killed, GROUPS, 2))


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
    free = psutil.virtual_memory().available
    assert processes_for(9, int(0.3 * free)) in (1, 2) and processes_for(9, 2 * free) == 1
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
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))
