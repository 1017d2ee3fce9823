"""A study that takes no time, for the tests of the runner, the figures and the pages."""

from r2f_ext.errors import R2FError
from r2f_ext.studies import Measured, Panel, Study


class Squares(Study):
    """Measures x squared; `calls` counts, and settings in `broken` fail."""

    name = "squares"
    question = "How fast do squares grow?"
    method = "Numbers are multiplied by themselves."
    panels = (
        Panel("square", "x", ("kind",), x_log=True, lines={4.0: "four"}),
        Panel("square", "kind", title="bars"),
        Panel("nothing of this", "x"),
    )
    seeds = 2

    def __init__(self, broken=(), error=None):
        self.calls, self.broken = [], broken
        self.error = error or R2FError("the number is odd: use even ones.")

    def settings(self, world):
        return [{"x": 1}, {"x": 2}] if world.quick else [{"x": 1}, {"x": 2}, {"x": 4}]

    def measure(self, world, setting, seed):
        self.calls.append((setting["x"], seed))
        if setting["x"] in self.broken:
            raise self.error
        value = float(setting["x"]) ** 2
        return [Measured("square", [value, value + seed], {"kind": "plain"}), Measured("seconds", [0.5])]

    def conclude(self, world, table):
        row = table.one("square", x=2)
        return [] if row is None else [f"Two squared is {row.words()}."]
