"""What each operator's C++ code for the CPU is worth end to end: the same work with the operator's plain PyTorch form.

    python benchmarks/ops/cpu_ablation.py [--json FILE]

`ours` is the package as it is. Every rival is the package with one operator (forward and backward) in its plain PyTorch
form. A form stays if it makes a row faster by 3 % or more on more than one processor. Rows: a pass over 400 pairs, ten
iterations of matching, a fit of ridge and one epoch of the MLP decoder on 500 pairs, the decoding of eight updates by
each of them, and a Jacobian of the update along 64 directions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import Functions, interleaved_medians, json_parser, machine, row, sentence, write_json
from plain import TV_WEIGHT
from targets import all_linear, initial_a

from r2f_ext.capture import Capture
from r2f_ext.data import load_images
from r2f_ext.decoders import MLP, Ridge
from r2f_ext.inversion.matching import MatchingConfig, match
from r2f_ext.inversion.objectives import GradientObjective, UpdateObjective
from r2f_ext.inversion.update_map import UpdateMap
from r2f_ext.models import load_base
from r2f_ext.ops import decoder_reference, reference
from r2f_ext.ops.schemas import NAMESPACE, SCHEMAS
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import Gradient

PAIRS, FITTED, VICTIMS, STEPS, DIRECTIONS, ROUNDS = 400, 500, 8, 10, 64, 7


def main() -> None:
    options = json_parser(__doc__).parse_args()
    rows = []
    for name, (shape, work) in works().items():
        used = [operator for operator in operators() if calls(operator, work)]
        rivals = {f"plain {operator}": in_plain_form(operator, work) for operator in used}
        functions: Functions = {"ours": work, **rivals}
        rows.append(row(name, shape, torch.float32, interleaved_medians(functions, ROUNDS)))
        print(sentence(rows[-1]), flush=True)
    if options.json:
        write_json(options.json, {"machine": machine(), "rows": rows})


def operators() -> list[str]:
    """Each operator once, without its backward."""
    return [name for name in SCHEMAS if not name.endswith("_backward")]


def calls(operator: str, work: Callable[[], object]) -> bool:
    """Whether the work calls the operator or its backward."""
    seen: list[str] = []
    with plain_form(operator, seen.append):
        work()
    return bool(seen)


@contextmanager
def plain_form(operator: str, on_call: Callable[[str], None] = lambda name: None) -> Iterator[None]:
    """The operator and its backward run their plain PyTorch form on the CPU."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name in (operator, f"{operator}_backward"):
        if name in SCHEMAS:
            plain = getattr(reference, name, None) or getattr(decoder_reference, name)
            library.impl(name, partial(_told, on_call, name, plain), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _told(on_call: Callable[[str], None], name: str, plain: Callable[..., object], *arguments: object) -> object:
    on_call(name)
    return plain(*arguments)


def in_plain_form(operator: str, work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with plain_form(operator):
            return work()

    return run


def works() -> dict[str, tuple[list[int], Callable[[], object]]]:
    """name -> (shape, what is timed)."""
    base = load_base()
    target, proxy = all_linear(base), load_images("embedded", count=FITTED)
    a, shape = initial_a(target), list(base.input_shape)
    pairs = GeneratedPairs(target, a, proxy)
    images, labels = proxy.batch(slice(0, VICTIMS)), proxy.labels[:VICTIMS]
    with Capture(target) as capture:
        gradient = capture(images[:, None], labels[:, None])
    observed = {name: gradient.dense(name).detach() for name in target.names}
    batch = next(iter(pairs.batches(0, VICTIMS)))
    updates = {name: each[:VICTIMS] for name, each in batch.updates.items()}
    config = MatchingConfig(steps=STEPS, step_size=0.05, tv_weight=TV_WEIGHT)
    start = torch.full_like(images, 0.5)
    ridge, mlp = Ridge(), MLP(epochs=1)
    ridge.fit(pairs, FITTED)
    mlp.fit(pairs, FITTED)
    updates_of, basis = UpdateMap(target, a, torch.Size(shape), DIRECTIONS), torch.eye(images[0].numel())

    def matching(count: int) -> object:
        objective = GradientObjective(Gradient({name: each[:count] for name, each in observed.items()}))
        return match(target, objective, start[:count], labels[:count], config, "matching", "benchmark")

    def refinement() -> object:
        return match(target, UpdateObjective(target, a, updates), start, labels, config, "refined", "benchmark")

    return {
        "pair pass": ([PAIRS, *shape], lambda: [None for _ in pairs.batches(0, PAIRS)]),
        "matching, one victim": ([1, *shape], lambda: matching(1)),
        "matching": ([VICTIMS, *shape], lambda: matching(VICTIMS)),
        "matching in LoRA space": ([VICTIMS, *shape], refinement),
        "ridge fit": ([FITTED, *shape], lambda: Ridge().fit(pairs, FITTED)),
        "mlp fit, one epoch": ([FITTED, *shape], lambda: MLP(epochs=1).fit(pairs, FITTED)),
        "ridge decode": ([VICTIMS, *shape], lambda: ridge.decode(updates)),
        "mlp decode": ([VICTIMS, *shape], lambda: mlp.decode(updates)),
        "Jacobian": (
            [DIRECTIONS, *shape],
            lambda: updates_of.jacobian(images[0].flatten(), labels[:1], basis[:, :DIRECTIONS]),
        ),
    }


if __name__ == "__main__":
    main()
