"""The benchmark suites: one tiny row is measured, recorded and read by benchmarks/tables.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import r2f_ext

pytest.importorskip("pytest_benchmark")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ROW = BENCHMARKS / "ops" / "bench_signed_adam_step.py"
# The machine's peaks take seconds to measure, and more on a busy machine: a plugin that gives them beforehand.
PEAKS = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import measure
measure.copy_bandwidth = lambda device="cpu": 1e10
measure.gemm_flops = lambda dtype=None, device="cpu": 1e11
"""


def run(folder: Path, *arguments: str | Path) -> str:
    """A Python process that imports the r2f_ext under test."""
    package = Path(r2f_ext.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(folder)])}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "peaks.py").write_text(PEAKS)
    suite = ("-m", "pytest", "-p", "peaks", "-p", "no:cacheprovider", ROW, "-k", "1x3x32x32", "--rounds", "5")
    out = run(folder, *suite, "--benchmark-json=record.json")
    assert "1 rows" in out  # the summary at the end
    return folder / "record.json"


def test_a_row_is_recorded_with_its_rivals_and_the_machine(record: Path) -> None:
    content = json.loads(record.read_text())
    (entry,) = content["benchmarks"]
    line: dict[str, Any] = entry["extra_info"]
    assert entry["group"] == line["name"] == "signed_adam_step_"
    assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == 5
    assert line["ours_ms"] == pytest.approx(1e3 * entry["stats"]["median"])
    assert len(line["rivals_ms"]) == 3 and line["rivals_ms"][line["best_rival"]] == min(line["rivals_ms"].values())
    assert line["ratio"] == pytest.approx(line["rivals_ms"][line["best_rival"]] / line["ours_ms"])
    assert line["roofline_fraction"] > 0
    machine = content["machine_info"]
    assert machine["r2f_ext"] == r2f_ext.__version__ and machine["copy_GB_per_s"] > 0
    assert "node" not in machine  # no host name in a record that is committed


def test_tables_reads_the_record_and_lists_losses(record: Path) -> None:
    content = json.loads(record.read_text())
    content["benchmarks"][0]["extra_info"]["ratio"] = 0.5
    other = record.with_name("other.json")
    other.write_text(json.dumps({**content, "machine_info": {**content["machine_info"], "cpu": "Another"}}))
    run(record.parent, BENCHMARKS / "tables.py", record, other, "--write", "tables.md")
    text = (record.parent / "tables.md").read_text()
    assert "## Side by side" in text and "## Another" in text
    assert "* `signed_adam_step_` [1, 3, 32, 32] float32, wall: 0.50" in text.partition("## Another")[2]


def test_fewer_than_five_rounds_are_refused(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "pytest", str(ROW), "--rounds", "4", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "at least 5" in done.stderr


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC 9B14 96-Core Processor", "amd-epyc-9b14"),
        ("Intel(R) Xeon(R) Processor @ 2.10GHz", "intel-xeon"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_a_record_is_named_after_its_processor(monkeypatch: pytest.MonkeyPatch, name: str, slug: str) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import slug as slug_of

    assert slug_of(name) == slug


def test_a_random_order_holds_every_function_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import orders

    found = list(orders(["ours", "a", "b"], 30))
    assert len(found) == 30 and all(sorted(order) == ["a", "b", "ours"] for order in found)
    assert {order.index("ours") for order in found} == {0, 1, 2}


def test_medians_are_over_five_rounds_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import interleaved_medians

    with pytest.raises(ValueError, match="at least 5"):
        interleaved_medians({"ours": lambda: None}, 4)
