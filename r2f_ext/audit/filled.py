"""Fields of schema 2 that a report does not have yet, empty."""

from __future__ import annotations

from typing import Any


def filled(data: dict[str, Any]) -> dict[str, Any]:
    """The data of report.json with every field that the page and the terminal read."""
    sentences = [part["verdict"] for part in data["reconstruction"].values()]
    verdict: dict[str, Any] = {
        "leak": None,
        "beyond_control_db": None,
        "interval_db": None,
        "confidence": 0.95,
        "exact": [],
    }
    verdict |= {"threat_model": {}, "tried": [], "not_tried": [], "sentences": sentences}
    sets = {
        name: {
            "control_intervals": {},
            "judged_route": None,
            "pairing": None,
            **part,
            "routes": {route: {"exact": None, **values} for route, values in part["routes"].items()},
        }
        for name, part in data["reconstruction"].items()
    }
    return {"verdict": verdict, "date": "", "command": None, "spectra": {}, **data, "reconstruction": sets}
