"""One function a command; each returns what it printed, as data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from r2f_ext.audit.assign import assign
from r2f_ext.audit.demo import Finished, demo, finish
from r2f_ext.audit.figures import write_images
from r2f_ext.audit.phase0 import run_phase0
from r2f_ext.audit.report import set_report, target_figures
from r2f_ext.audit.row_space import run_row_space
from r2f_ext.audit.run import audit, match_decoded, refine
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import console, drawn_stages, print_phase0, print_report, print_target, print_verdicts, table
from r2f_ext.cli.fit import run_fit
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, ProceduralStream, ProxyImages, drop_private, load_images
from r2f_ext.decoders import AgnosticPairs, load_core, load_decoder, stack_updates
from r2f_ext.decoders.store import read_gradients
from r2f_ext.env import environment
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder, write_tensors
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.gauss_newton import Subspace, gauss_newton, obstacle
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.inversion.prior import ScoreDistillation
from r2f_ext.inversion.unet import UNetConfig, UNetInverter
from r2f_ext.inversion.well_known import COLUMNS, WELL_KNOWN, closed_forms
from r2f_ext.models import attach, load_base, read_adapter, shape_of, untouched_a
from r2f_ext.pairs import (
    GeneratedPairs,
    ReprojectedPairs,
    SimulatedPairs,
    StoredPairs,
    Training,
    WritablePairs,
    write_pairs,
)
from r2f_ext.types import BaseModel, LoraUpdate, Reconstruction, Target

Options = argparse.Namespace


def run_audit(options: Options) -> dict[str, Any]:
    target, adapters = _adapters(options.adapter, options)
    base = target.base
    folder = output_folder(options.out)
    steps = 1 if all(untouched_a(update) for update in adapters) else None
    verdicts = identifiability(base, adapter=target, steps=steps)
    print_target({**target_figures(target, verdicts), "steps": _say_steps(steps)})

    config = AuditConfig(
        pairs=options.count,
        gauss_newton=options.gauss_newton and _gauss_newton_applies(target, adapters),
        precision=options.precision,
        seed=options.seed,
    )
    proxy = _images(options.proxy, base, options, "proxy", count=config.pairs)
    private = None if options.private is None else _private(options.private, base, options)
    if private is not None:
        if len(private) < len(adapters):
            raise R2FError(f"--private gives {len(private)} images for {len(adapters)} adapters: give one for each.")
        proxy = drop_private(proxy, private)
    for note in proxy.notes:
        console.print(f"note: {escape(note)}")
    row_space = _row_space(target, adapters, options)
    with drawn_stages() as stages:
        result = audit(target, adapters, proxy, config, stages)
    result = replace(result, reconstructions=[*result.reconstructions, *row_space])
    if private is not None:
        private = _pair_up(private, result.reconstructions[1].images.cpu())
    part = set_report(Path(options.adapter[0]).resolve().name, result, proxy, private)
    write_tensors(folder / "gradients.safetensors", result.decoded.dense, {"unit": "the victim's learning rate"})
    done = finish(folder, target, verdicts, {proxy.name: result}, [part], [], [], config, result.seconds)
    return _say_finished(done)


def run_demo(options: Options) -> dict[str, Any]:
    if options.base != "embedded":
        raise R2FError("the demo makes its victims on the embedded base: leave --base out, or use r2f audit.")
    folder = output_folder(options.out)
    with drawn_stages() as stages:
        done = demo(folder, AuditConfig(seed=options.seed), chosen_device(options), stages)
    return _say_finished(done)


def run_phase0_command(options: Options) -> dict[str, Any]:
    base = load_base(options.base, chosen_device(options))
    folder = output_folder(options.out)
    images = _images(options.images, base, options, "private", count=options.count)
    verdicts = identifiability(base, adapter=None)
    print_verdicts([(v.route, v.identifiable, v.why) for v in verdicts.values()])
    figures, pictures = run_phase0(base, images)
    write_images(folder / "phase0.png", [("original", images.batch(slice(None))), *pictures])
    print_phase0(f"{len(images)} exact gradients, inverted in closed form", figures)
    if not figures:
        console.print("No closed form applies to this base: see the reasons above; the picture shows the originals.")
    console.print(f"pictures: {escape(str(folder / 'phase0.png'))}")
    return {"phase0": figures, "identifiable": {v.route: v.identifiable for v in verdicts.values()}}


def run_identifiability(options: Options) -> dict[str, Any]:
    counted = {name: closed_forms(shape_of(name, options.image_size)) for name in options.model or WELL_KNOWN}
    rows = [[name, *one.cells()] for name, one in counted.items()]
    table("Which closed forms can be exact (batch 1)", list(COLUMNS), rows)
    if len(counted) == 1:
        print_verdicts([(v.route, v.identifiable, v.why) for v in identifiability(options.model[0]).values()])
    return {name: asdict(one) for name, one in counted.items()}


def run_pairs(options: Options) -> dict[str, Any]:
    target, (adapter,) = _adapters([options.adapter], options)
    folder = output_folder(options.out)
    a = {name: a.float() for name, a in adapter.a.items()}
    pairs = _new_pairs(options, target, a)
    count = min(options.count, len(pairs))
    with drawn_stages() as stages, stages.stage("pairs", count) as advance:
        write_pairs(pairs, count, folder, advance, options.dense, _say_size(count))
    rate = count / stages.seconds["pairs"]
    console.print(f"{count} pairs, {rate:,.0f} a second, in {escape(str(folder))}")
    return {"count": count, "per_second": rate, "proxy": pairs.recipe["proxy"]}


def _say_size(count: int) -> Callable[[int], None]:
    return lambda size: console.print(f"{count:,} pairs take {size / 1e9:.2f} GB on disk")


def _new_pairs(options: Options, target: Target, a: dict[str, torch.Tensor]) -> WritablePairs:
    training = _training(options)
    own_a = options.seed if options.own_a else None
    if options.cache is not None:
        if training is not None or options.dense:
            raise R2FError("--cache holds gradients of one step at the start: leave training and --dense out.")
        if Path(options.cache).resolve() == Path(options.out).resolve():
            raise R2FError(f"--cache and --out are the same folder '{options.out}': name another one.")
        return ReprojectedPairs(StoredPairs(options.cache, target.base), target, a, own_a)
    owned = training.owned if training is not None else 1
    proxy = _proxy_images(options, target.base, options.count * owned)
    if training is None or training.plain_step:
        group_size = 1 if training is None else training.batch
        return GeneratedPairs(target, a, proxy, group_size, options.precision, own_a)
    return SimulatedPairs(target, a, proxy, training, options.seed, None, own_a, options.dense, options.precision)


def _proxy_images(options: Options, base: BaseModel, count: int) -> ProxyImages:
    if options.proxy == "procedural" and count > 0:  # a count below is refused with all the others
        return ProceduralStream(count, base.input_shape, base.num_classes, options.seed)
    return _images(options.proxy, base, options, "proxy", count=count)


def _training(options: Options) -> Training | None:
    """The victims' training where anything about it was asked; None: one step of SGD on one image."""
    asked = {f.name: getattr(options, f.name) for f in fields(Training) if getattr(options, f.name) is not None}
    return Training(**asked) if asked else None


def run_decode(options: Options) -> dict[str, Any]:
    target, adapters = _adapters([options.adapter], options)
    folder, decoders = output_folder(options.out), Path(options.decoders)
    pairs, updates = StoredPairs(options.pairs, target.base), stack_updates(adapters)
    if pairs.per_victim_a:
        if pairs.target.layers != target.layers:
            raise R2FError(f"the pairs in '{options.pairs}' are of other layers, rank or alpha: make new ones.")
        seen = AgnosticPairs(pairs, load_core(decoders, pairs))
        updates = seen.view(updates, adapters[0].a)
        decoder = load_decoder(decoders, options.kind, pairs, seen)
    else:
        _same_a(pairs, adapters[0])
        decoder = load_decoder(decoders, options.kind, pairs)
    decoded = decoder.decode(updates)
    path = folder / "gradients.safetensors"
    write_tensors(path, decoded.dense, {"kind": options.kind, "unit": "the victim's learning rate"})
    norms = {name: float(gradient.norm()) for name, gradient in decoded.dense.items()}
    table("Decoded gradients", ["layer", "norm"], [[name, f"{norm:.3e}"] for name, norm in norms.items()])
    console.print(f"gradients: {escape(str(path))}")
    return {"kind": options.kind, "norms": norms, "file": path.name}


def run_invert(options: Options) -> dict[str, Any]:
    target, adapters = _adapters([options.adapter], options)
    folder = output_folder(options.out)
    pairs = StoredPairs(options.pairs, target.base)
    _same_a(pairs, adapters[0])
    gradients = None if options.gradients is None else read_gradients(Path(options.gradients), target, len(adapters))
    observed, config = stack_updates(adapters), AuditConfig(seed=options.seed)
    pull = None if options.prior is None else ScoreDistillation.from_folder(options.prior, seed=options.seed).gradient
    row_space = _row_space(target, adapters, options)
    with drawn_stages() as stages:
        with stages.stage("amortised"):
            images, labels = pairs.samples()
            inverter = AmortisedInverter(pairs.updates(0, len(pairs)), images, labels, target.base.num_classes)
            found = [inverter.invert(observed)]
            far = int(inverter.far_from_proxy(observed).sum())
        if options.inverter == "unet":
            net = UNetConfig(seed=options.seed)
            with stages.stage("U-Net", net.epochs) as advance:
                found = [UNetInverter(inverter, net, advance).invert(observed)]
        with stages.stage("refinement", config.refinement.steps) as advance:
            found.append(refine(target, pairs.a, observed, found[0], config.refinement, advance, pull))
        if options.gauss_newton and _gauss_newton_applies(target, adapters):
            with stages.stage("gauss_newton", len(adapters)) as advance:
                found.append(gauss_newton(target, pairs.a, observed, found[0], Subspace.of(images), advance=advance))
        found += row_space
        if gradients is not None:
            with stages.stage("matching", config.matching.steps) as advance:
                found.append(match_decoded(target, gradients, found[0], config.matching, advance, pull))
    for part in found:
        write_images(folder / f"{part.route}.png", [(part.route, part.images.cpu())])
    write_tensors(folder / "images.safetensors", {part.route: part.images for part in found})
    if far:
        console.print(
            f"warning: {far} of {len(adapters)} updates resemble no proxy update: the amortised estimate is not to be "
            "trusted; use a proxy that is nearer to the private data, or procedural."
        )
    table("Routes taken", ["route", "seconds", "why"], [[p.route, f"{p.seconds:.1f}", p.why] for p in found])
    console.print(f"images: {escape(str(folder))}")
    routes = {p.route: {"seconds": p.seconds, "why": p.why, "details": p.details} for p in found}
    return {"routes": routes, "far_from_proxy": far}


def run_env(options: Options) -> dict[str, Any]:
    information = environment()
    console.print_json(json.dumps(information))
    return information


COMMANDS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "audit": run_audit,
    "demo": run_demo,
    "phase0": run_phase0_command,
    "identifiability": run_identifiability,
    "pairs": run_pairs,
    "fit": run_fit,
    "decode": run_decode,
    "invert": run_invert,
    "env": run_env,
}


DISTRIBUTED = ("pairs", "fit")  # what torchrun may start


def uses_cuda(options: Options) -> bool:
    """Whether the command runs on a GPU."""
    return "device" in options and chosen_device(options).startswith("cuda")


def _adapters(folders: list[str], options: Options) -> tuple[Target, list[LoraUpdate]]:
    files = [read_adapter(folder) for folder in folders]
    base = load_base(options.base, chosen_device(options), files[0].num_classes)
    bound = [attach(file, base) for file in files]
    return bound[0][0], [update for _, update in bound]


def _row_space(target: Target, adapters: list[LoraUpdate], options: Options) -> list[Reconstruction]:
    outcome = run_row_space(target, adapters, options.initial, options.a0_seed)
    console.print(f"adapter_rowspace: {escape(outcome.why)}")
    return [] if outcome.found is None else [outcome.found]


def _gauss_newton_applies(target: Target, adapters: list[LoraUpdate]) -> bool:
    reason = obstacle(target, adapters)
    if reason is not None:
        console.print(f"gauss_newton is refused: {reason}.")
    return reason is None


def _same_a(pairs: StoredPairs, adapter: LoraUpdate) -> None:
    """Raise R2FError where the pairs were not made with this adapter's A."""
    if pairs.per_victim_a:
        raise R2FError(f"the victims of '{pairs.folder}' have each their own A: make pairs without --own-a.")
    extra = [name for name in pairs.a if name not in adapter.a]
    if extra:
        raise R2FError(f"the pairs in '{pairs.folder}' were made for another adapter ({extra[0]} too): make new ones.")
    for name, a in adapter.a.items():
        if (
            name not in pairs.a
            or pairs.a[name].shape != a.shape
            or not torch.allclose(pairs.a[name], a.float(), atol=1e-2)
        ):
            raise R2FError(
                f"the pairs in '{pairs.folder}' were made for another adapter (A of {name} differs): make new ones."
            )


def _images(spec: str, base: BaseModel, options: Options, role: str, count: int | None) -> ImageSet:
    return load_images(
        spec, input_shape=base.input_shape, num_classes=base.num_classes, count=count, seed=options.seed, role=role
    )


def _private(spec: str, base: BaseModel, options: Options) -> ImageSet:
    """`DATA`, or `DATA:INDEX` for one image of it."""
    name, _, index = spec.rpartition(":")
    if not name or not index.isdigit():
        return _images(spec, base, options, "private", None)
    images = _images(name, base, options, "private", None)
    if int(index) >= len(images):
        raise R2FError(f"--private {spec}: '{name}' has {len(images)} images, counted from 0.")
    return replace(images.take(torch.tensor([int(index)])), name=spec)


def _pair_up(private: ImageSet, images: torch.Tensor) -> ImageSet:
    """Private images in the adapters' order: as given if there are as many, else the best match by PSNR."""
    if len(private) == len(images):
        return private
    console.print(
        f"note: {len(private)} private images for {len(images)} adapters: each adapter is scored against its best "
        "match, which flatters it; name the true image with --private DATA:INDEX."
    )
    return private.take(assign(images, private.batch(slice(None))))


def _say_steps(steps: int | None) -> str:
    if steps == 1:
        return "A still lies in PEFT's initial range, as after one step"
    return "A has left PEFT's initial range, so more than one step was taken"


def _say_finished(done: Finished) -> dict[str, Any]:
    console.print()
    print_report(done.report)
    console.print(f"{done.report['seconds'].get('total', sum(done.report['seconds'].values())):.0f} s; see:")
    for name in ("report.html", "reconstructions.png", "report.json"):
        console.print(f"  {escape(str(done.folder / name))}")
    return done.report
