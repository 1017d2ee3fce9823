"""Study `decoder`: which decoder finds the gradient, from which input, trained for which loss, on how many pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from r2f_ext.decoders import (
    KINDS,
    MLP,
    AgnosticPairs,
    ConcatenatedPairs,
    Decoder,
    HeldOut,
    ProductPairs,
    held_out_cosines,
)
from r2f_ext.decoders.agnostic import SIZE
from r2f_ext.decoders.core import SAMPLE, Core
from r2f_ext.decoders.learned import Learned
from r2f_ext.pairs import GeneratedPairs, updates_of
from r2f_ext.studies.pairs_in_memory import PairsInMemory
from r2f_ext.studies.scene import (
    ClassMean,
    Observed,
    base_of,
    compared_with,
    fit_together,
    private_images,
    public_images,
    start_of,
    target_of,
    victims_of,
)
from r2f_ext.studies.study import Data, Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Row, Table, Value, difference
from r2f_ext.types import Gradient, Target

PAIRS, OTHER_PAIRS = (500, 1000, 2000, 4000), 1000  # of closed forms: on the first data set; on each other one
TRAINED_PAIRS, FEW_PAIRS = 1000, 500  # where losses or inputs are compared; where the slowest kinds are
HELD_OUT, VICTIMS, LAYER_STEP = 100, 16, 5
QUICK_PAIRS, QUICK_TRAINED, QUICK_HELD_OUT, QUICK_VICTIMS, QUICK_EPOCHS = (60, 120), 120, 20, 4, 3
TRAINED = (TRAINED_PAIRS, QUICK_TRAINED)
CLOSED, COSINE, MSE, WITH_NORM = "closed form", "1 - cos", "MSE", "1 - cos + log-norm"
LOSSES = {COSINE: "cosine", MSE: "mse", WITH_NORM: "cosine_norm"}
B, BA, BOTH, PROJECTED = "B", "BA", "A and B", "G P_A"
ONE, EACH = "one for all", "one each"
CLASS_MEAN, FLOORS = ClassMean.kind, (ClassMean.kind, "projection")
COLUMNS = ("starts", "pairs", "decoder", "inputs", "loss")
HELD_OUT_PROXIES, OWN_VICTIMS = "held-out proxies", "victims"
FORMS: dict[str, type[AgnosticPairs]] = {BA: ProductPairs, BOTH: ConcatenatedPairs, PROJECTED: AgnosticPairs}


class DecoderStudy(Study):
    """Study `decoder`: cosine and norm error of the decoders, by pairs, form of the input and loss."""

    name = "decoder"
    question = "Which decoder finds the gradient, from which input, trained for which loss, on how many pairs?"
    method = (
        f"{VICTIMS} victims a seed and data set (r = 8, one image, one step of SGD); proxies of that data set; every "
        f"{LAYER_STEP}th adapted layer is decoded (on the embedded base qkv, proj, fc1, fc2, one in each block), from "
        "the updates of all layers: the decoder of a layer does not depend on which others are decoded. Decoders have "
        f"the library's default settings. Cosine: the mean over these layers, one value for each of the victims and of "
        f"{HELD_OUT} held-out proxies; cosine_worst_layer: of the layer with the lowest mean; cosine_p05: the 5th "
        "percentile of the mean over layers; norm_error: ||decoded| / |true| - 1|. While all proxies share the "
        "victim's A, A is a constant, so that A and B side by side are no other input than B alone, and BA is B in "
        "other coordinates. So that the inputs differ, decoders are also fitted to proxies with an A each, and decode "
        "victims whose A they have not seen; G P_A is B (A A^T)^-1 A, BA without the distortion by A. Seconds of a "
        "closed form or training do not include making the pairs (pair_seconds). 20,000 pairs, on all layers, are in "
        "benchmarks/results/0.1.0/decoders.json; benchmarks/decoders/compare_decoders.py --pairs takes any number."
    )
    no_controls = (
        "Mean image and stranger are controls of images; this study makes none. The class mean has no norm, so no norm "
        "error; it is given the true label."
    )
    panels = (
        Panel(
            "cosine",
            "pairs",
            ("decoder",),
            {"set": "first", "images": OWN_VICTIMS, "starts": ONE, "inputs": B, "loss": (CLOSED, WITH_NORM)},
            "Victims: decoders and pairs",
            "pairs",
            x_log=True,
        ),
        Panel(
            "cosine",
            "inputs",
            ("decoder", "starts"),
            {
                "set": "first",
                "images": OWN_VICTIMS,
                "pairs": TRAINED,
                "decoder": (CLASS_MEAN, "ridge", "mlp"),
                "loss": (CLOSED, WITH_NORM),
            },
            "Victims: inputs, with one A for all proxies or one each",
        ),
        Panel(
            "cosine",
            "loss",
            ("decoder",),
            {"images": OWN_VICTIMS, "pairs": TRAINED, "inputs": B, "loss": tuple(LOSSES)},
            "Victims: losses",
        ),
        Panel(
            "seconds", "pairs", ("decoder",), {"set": "first", "inputs": B, "loss": (CLOSED, WITH_NORM)},
            "Seconds to fit", x_log=True, y_log=True,
        ),
    )  # fmt: skip
    seeds = 2

    def settings(self, world: World) -> list[Setting]:
        return [
            {"data": data.name, "set": place, **dict(zip(COLUMNS, row, strict=True))}
            for data in (world.data[:1] if world.quick else world.data)
            for place in ("first" if data is world.data[0] else "other",)
            for row in _rows(world.quick, place == "first")
        ]

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        data, count = world.named(str(setting["data"])), int(setting["pairs"])
        scene = _scene(world, data, seed)
        kept = _kept(world, data, seed, setting["starts"] == EACH)
        rows, victims = slice(len(kept.pairs) - scene.held_out, len(kept.pairs)), scene.victims
        source: PairsInMemory | AgnosticPairs = kept.pairs
        asked = victims.updates
        if kept.core is not None and setting["decoder"] != CLASS_MEAN:
            source = FORMS[str(setting["inputs"])](kept.pairs, kept.core)
            asked = source.view(asked, scene.a)
        held_out = updates_of(source, rows.start, rows.stop)
        decoder = _decoder(setting, seed, QUICK_EPOCHS if world.quick else None)
        began = time.perf_counter()
        fit_together(source, count, [decoder])
        fitted = time.perf_counter()
        if isinstance(decoder, ClassMean):
            labels = torch.cat([kept.pairs.labels(rows.start, rows.stop), victims.labels[:, 0]])
            decoded = decoder.guess(labels[:, None])
        else:
            decoded = decoder.decode({name: torch.cat([each, asked[name]]) for name, each in held_out.items()})
        done = time.perf_counter()
        parts = [
            Gradient({n: g[part] for n, g in decoded.dense.items()})
            for part in (slice(scene.held_out), slice(scene.held_out, None))
        ]
        figures = {
            HELD_OUT_PROXIES: held_out_cosines(parts[0], kept.pairs, rows.start, rows.stop),
            OWN_VICTIMS: compared_with(parts[1], victims.gradient),
        }
        took = {"seconds": fitted - began, "decode_seconds": done - fitted, "pair_seconds": kept.seconds}
        found = [Measured(metric, [t], {"images": HELD_OUT_PROXIES}) for metric, t in took.items()]
        for images, figure in figures.items():
            found += _figures(figure, {"images": images}, setting["decoder"] != CLASS_MEAN)
        return found

    def conclude(self, world: World, table: Table) -> list[str]:
        rows = table.where("cosine", images=OWN_VICTIMS)
        tried = [row for row in rows if row.keys["decoder"] not in FLOORS and _floor(table, row)]
        missed: dict[str, list[str]] = {}
        for row in tried:
            if not _beats(row, _floor(table, row)):
                missed.setdefault(_name(row), []).append(str(row.keys["pairs"]))
        said = []
        if missed:
            said.append(
                "Not shown to be above the mean gradient of the victim's class, which needs no decoder but knows the "
                "label: " + "; ".join(f"{name}, {', '.join(pairs)} pairs" for name, pairs in missed.items()) + "."
            )
        elif tried:
            said.append("Every decoder is above the mean gradient of the victim's class, at every number of pairs.")
        for data in world.data:
            of_data = [row for row in tried if row.keys["data"] == data.name]
            if of_data:
                said.append(_best_of(table, data, max(of_data, key=lambda row: row.mean)))
        said += [words for decoder in ("ridge", "mlp", "conv", "unet") if (words := _growth(rows, decoder))]
        said += _compared(rows, "inputs", {"loss": (CLOSED, WITH_NORM)}, B, BOTH)
        said += _compared(rows, "loss", {"inputs": B, "starts": ONE}, COSINE, COSINE)
        norms = table.where("norm_error", images=OWN_VICTIMS, inputs=B, starts=ONE, loss=tuple(LOSSES))
        compared = [row for row in norms if row.keys["pairs"] in TRAINED]
        if len(compared) > 1:
            said.append(
                "Relative error of the norm by loss: "
                + "; ".join(f"{row.keys['decoder']}, {row.keys['loss']}: {row.words(2)}" for row in compared)
                + ". The cosine alone does not determine the norm."
            )
        return said


def _rows(quick: bool, first: bool) -> Iterator[tuple[str, int, str, str, str]]:
    """The values of COLUMNS for one data set, in the order of measurement."""
    for pairs in (QUICK_PAIRS if quick else PAIRS) if first else (OTHER_PAIRS,):
        yield from ((ONE, pairs, decoder, B, CLOSED) for decoder in (*FLOORS, "row_lmmse", "ridge"))
    if not first:
        return
    pairs = QUICK_TRAINED if quick else TRAINED_PAIRS
    yield from ((ONE, pairs, "mlp", B, loss) for loss in ((WITH_NORM,) if quick else LOSSES))
    if not quick:
        yield ONE, pairs, "mlp", BA, WITH_NORM
        yield ONE, FEW_PAIRS, "kernel_ridge", B, CLOSED
        yield from ((ONE, FEW_PAIRS, decoder, B, WITH_NORM) for decoder in ("mlp", "conv", "unet"))
    yield EACH, pairs, CLASS_MEAN, BOTH, CLOSED
    for inputs in FORMS:
        yield EACH, pairs, "ridge", inputs, CLOSED
        if inputs != PROJECTED and not quick:
            yield EACH, pairs, "mlp", inputs, WITH_NORM


@dataclass(frozen=True)
class Scene:
    """One seed's pairs of public images, and its victims; only the layers named in `decoded` are decoded."""

    target: Target
    a: dict[str, torch.Tensor]
    victims: Observed
    pairs: GeneratedPairs
    decoded: tuple[str, ...]
    count: int
    held_out: int


@dataclass(frozen=True)
class Kept:
    """Pairs in memory, the seconds it took to make them, and, if every pair has its own A, the core of all layers."""

    pairs: PairsInMemory
    seconds: float
    core: Core | None


@lru_cache(maxsize=1)
def _scene(world: World, data: Data, seed: int) -> Scene:
    base = base_of(world.base, world.device)
    target, held_out = target_of(base), QUICK_HELD_OUT if world.quick else HELD_OUT
    a = start_of(target, seed)
    count = max(pairs for _, pairs, *_ in _rows(world.quick, data == world.data[0]))
    public = public_images(base, data, seed, count + held_out, least=count + held_out)
    private = private_images(base, data, seed, QUICK_VICTIMS if world.quick else VICTIMS)
    victims = victims_of(target, a, private)
    return Scene(target, a, victims, GeneratedPairs(target, a, public), target.names[::LAYER_STEP], count, held_out)


@lru_cache(maxsize=1)
def _kept(world: World, data: Data, seed: int, each: bool) -> Kept:
    scene = _scene(world, data, seed)
    pairs, count = scene.pairs, scene.count
    if each:
        pairs = GeneratedPairs(scene.target, scene.a, scene.pairs.proxy, per_victim_a=seed + 1)
        count = QUICK_TRAINED if world.quick else TRAINED_PAIRS
    began = time.perf_counter()
    kept = PairsInMemory.of(pairs, count + scene.held_out, scene.decoded)
    seconds = time.perf_counter() - began
    return Kept(kept, seconds, Core.of(pairs, min(SAMPLE, count), SIZE) if each else None)


def _decoder(setting: Setting, seed: int, epochs: int | None) -> Decoder | ClassMean:
    if setting["decoder"] == CLASS_MEAN:
        return ClassMean()
    kind = KINDS[str(setting["decoder"])]
    if not issubclass(kind, Learned):
        return kind()
    loss = LOSSES[str(setting["loss"])]
    if kind is MLP and setting["starts"] == ONE:
        return MLP(loss, epochs, seed, "ba" if setting["inputs"] == BA else "b")
    return kind(loss, epochs, seed)


def _figures(figures: HeldOut, labels: Setting, with_norms: bool) -> list[Measured]:
    cosines = torch.stack(list(figures.cosine.values()))
    found = [
        Measured("cosine", cosines.mean(0).tolist(), labels),
        Measured("cosine_worst_layer", cosines[cosines.mean(1).argmin()].tolist(), labels),
        Measured("cosine_p05", [float(cosines.mean(0).quantile(0.05))], labels),
    ]
    if with_norms:
        errors = (torch.stack(list(figures.norm.values())) - 1).abs()
        found.append(Measured("norm_error", errors.mean(0).tolist(), labels))
    return found


def _floor(table: Table, row: Row) -> Row | None:
    """The class mean of the same pairs and victims."""
    same = {name: row.keys[name] for name in ("data", "starts", "pairs", "images")}
    return table.one("cosine", decoder=CLASS_MEAN, **same)


def _beats(row: Row, floor: Row | None) -> bool:
    """Whether a decoder is above its floor on the same victims by more than the interval of the difference."""
    above = None if floor is None else difference(row, floor)
    return above is not None and above.positive


def _name(row: Row) -> str:
    keys = row.keys
    trained = "" if keys["loss"] == CLOSED else f", loss {keys['loss']}"
    starts = "" if keys["starts"] == ONE else ", an A each"
    return f"{keys['decoder']} of {keys['inputs']}{starts}{trained} ({keys['data']})"


def _best_of(table: Table, data: Data, best: Row) -> str:
    where = {name: best.keys[name] for name in ("data", "starts", "pairs", "images")}
    floors = [row for kind in FLOORS if (row := table.one("cosine", decoder=kind, **where))]
    return (
        f"Victims of {data.name}: best is {_name(best)}, {best.keys['pairs']} pairs, cosine {best.words(3)}; "
        + "; ".join(f"{row.keys['decoder']} {row.words(3)}" for row in floors)
        + "."
    )


def _growth(rows: list[Row], decoder: str) -> str:
    """A sentence: how the cosine of a decoder grows with the number of pairs, on the same data."""
    own = [row for row in rows if (row.keys["decoder"], row.keys["inputs"], row.keys["starts"]) == (decoder, B, ONE)]
    own = [row for row in own if row.keys["set"] == "first" and row.keys["loss"] in (CLOSED, WITH_NORM)]
    if len(own) < 2:
        return ""
    own.sort(key=lambda row: float(row.keys["pairs"]))
    return f"{decoder} by pairs: " + ", ".join(f"{row.keys['pairs']}: {row.mean:.3f}" for row in own) + "."


def _compared(rows: list[Row], column: str, same: dict[str, Value | tuple[Value, ...]], *references: str) -> list[str]:
    """Sentences that compare the cosine at each value of a column with that at the reference, on the same victims."""
    said = []
    for row in Table(rows).where("cosine", set="first", **same):
        if row.keys["decoder"] in FLOORS:
            continue
        wanted = {**row.keys, column: references[row.keys["starts"] != ONE]}
        base = next((each for each in rows if each.keys == wanted), None)
        change = None if base is None or base is row else difference(row, base)
        if change is not None and base is not None:
            said.append(
                f"{_name(row)}, {row.keys['pairs']} pairs: cosine {row.mean:.3f} against {base.mean:.3f} with {column} "
                f"{base.keys[column]}, a difference of {change.words(3)}{_nothing(change)}."
            )
    return said


def _nothing(change: Row) -> str:
    includes = change.low is None or change.high is None or change.low <= 0 <= change.high
    return ", which is nothing" if includes else ""
