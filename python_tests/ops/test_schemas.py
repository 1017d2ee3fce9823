"""Operators are exactly what the pipeline calls: every schema, and every argument of it, has a caller outside `ops`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import r2f_ext
from r2f_ext import ops
from r2f_ext.ops.schemas import SCHEMAS

# Schema argument -> the parameter of the public function that it is computed from, where the names differ.
DERIVED = {
    ("signed_adam_step_", "beta1"): "betas",
    ("signed_adam_step_", "beta2"): "betas",
    ("matching_loss", "with_gradients"): "candidate",  # set if the candidate requires a gradient
    ("perceptrons", "with_saved"): "weights",  # set if one of the tensors requires a gradient
}
FORWARD = [name for name in SCHEMAS if not name.endswith("_backward")]


@dataclass
class Calls:
    """The calls of one function: the largest number of positional arguments, and all keywords."""

    positional: int = 0
    keywords: set[str] = field(default_factory=set)

    def add(self, call: ast.Call, bound: int) -> None:
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        self.positional = max(self.positional, bound if starred else len(call.args))
        self.keywords |= {keyword.arg for keyword in call.keywords if keyword.arg is not None}


def calls_in(source: str, functions: dict[str, Callable]) -> dict[str, Calls]:
    """Calls of functions imported from `r2f_ext.ops`, by name or as an attribute of the module."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("r2f_ext.ops"):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "r2f_ext":
            for alias in node.names:
                if alias.name == "ops":
                    names |= {f"{alias.asname or 'ops'}.{name}": name for name in functions}
    found: dict[str, Calls] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := names.get(ast.unparse(node.func))) in functions:
            bound = len(inspect.signature(functions[name]).parameters)
            found.setdefault(name, Calls()).add(node, bound)
    return found


def problems(name: str, arguments: Iterable[str], function: Callable | None, calls: Calls | None) -> list[str]:
    """What is unused or missing for one operator."""
    if function is None:
        return [f"{name} has no public function"]
    if calls is None:
        return [f"{name} has no caller outside ops"]
    parameters = list(inspect.signature(function).parameters.values())
    found = []
    for position, parameter in enumerate(parameters):
        by_position = parameter.kind is not parameter.KEYWORD_ONLY and position < calls.positional
        if not by_position and parameter.name not in calls.keywords:
            found.append(f"no caller passes {parameter.name} to {name}")
    public = {parameter.name for parameter in parameters}
    found += [
        f"argument {argument} of {name} comes from no parameter"
        for argument in arguments
        if DERIVED.get((name, argument), argument) not in public
    ]
    return found


def public_functions(names: Iterable[str]) -> dict[str, Callable]:
    return {name: getattr(ops, name) for name in names if hasattr(ops, name)}


@pytest.fixture(scope="module")
def calls() -> dict[str, Calls]:
    package = Path(r2f_ext.__file__).parent
    functions = public_functions(FORWARD)
    merged: dict[str, Calls] = {}
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "ops"):
            continue
        for name, found in calls_in(path.read_text(), functions).items():
            all_calls = merged.setdefault(name, Calls())
            all_calls.positional = max(all_calls.positional, found.positional)
            all_calls.keywords |= found.keywords
    return merged


@pytest.mark.parametrize("name", FORWARD)
def test_every_schema_and_argument_has_a_caller(name, calls):
    arguments = [a.name for a in getattr(torch.ops.r2f, name).default._schema.arguments]
    assert not problems(name, arguments, public_functions([name]).get(name), calls.get(name))


def test_every_backward_belongs_to_an_operator():
    backward = [name for name in SCHEMAS if name.endswith("_backward")]
    assert all(name.removesuffix("_backward") in FORWARD for name in backward)


def test_the_check_can_fail():
    """A schema that nobody calls, an argument that nobody passes, and one without a parameter are all found."""

    def fake(x: int, *, scale: float, offset: float = 0.0) -> None:
        """An operator's public function."""

    functions = {"fake": fake}
    used = calls_in("from r2f_ext.ops import fake as f\nf(1, scale=2.0)\nother.fake(1, offset=3)", functions)
    assert problems("fake", ["x"], None, None) == ["fake has no public function"]
    assert problems("fake", ["x"], fake, calls_in("fake(1)", functions).get("fake")) == [
        "fake has no caller outside ops"
    ]
    assert problems("fake", ["x", "scale", "bias"], fake, used["fake"]) == [
        "no caller passes offset to fake",
        "argument bias of fake comes from no parameter",
    ]
    every = calls_in("from r2f_ext import ops\nops.fake(*a, scale=1, offset=2)", functions)
    assert problems("fake", ["x", "scale", "offset"], fake, every["fake"]) == []


def test_autocast_changes_no_result():
    """Under autocast every operator keeps the dtypes and the precision that it documents."""
    x, delta, a = torch.randn(3, 6, 8), torch.randn(3, 6, 5), torch.randn(2, 8)

    def results() -> list[torch.Tensor]:
        total = torch.zeros(1, 5, 8)
        ops.add_weighted_gradients_([total], [torch.ones(1, 3)], [x], [delta])
        (update,) = ops.lora_grad([x], [delta], [a], scales=[2.0]).grad_B
        (tangent,) = ops.lora_grad_tangent([x], [delta], [x[None]], [delta[None]], [a], scales=[2.0])
        (decoded,) = ops.perceptrons([x[0]], [torch.ones(4, 8), torch.ones(3, 4)], [torch.ones(4), torch.ones(3)])
        loss = ops.matching_loss([update], [update + 1], images=x[:, None])
        factored = ops.factored_matching_loss([x], [delta], [total], images=x[:, None])
        return [total, update, tangent, decoded, loss, factored]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        cast = results()
    for one, other in zip(plain, cast, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
