"""One function a command; each returns what it printed, as data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from r2f_ext.audit.assign import assign
from r2f_ext.audit.demo import Finished, demo, finish
from r2f_ext.audit.report import set_report, target_figures
from r2f_ext.audit.run import run_audit_stages
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import console, drawn_stages, print_report, print_target, table
from r2f_ext.cli.fit import run_fit
from r2f_ext.cli.inputs import check_same_a, images_of, read_adapters
from r2f_ext.cli.invert import run_invert
from r2f_ext.cli.phase0 import run_identifiability, run_phase0_command
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, ProceduralStream, ProxyImages, drop_private
from r2f_ext.decoders import AgnosticPairs, load_core, load_decoder, stack_updates
from r2f_ext.env import environment
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder, write_tensors
from r2f_ext.inversion.route import adapter_problem
from r2f_ext.inversion.routes import verdicts_of
from r2f_ext.models import InitialFactors
from r2f_ext.pairs import (
    GeneratedPairs,
    ReprojectedPairs,
    SimulatedPairs,
    StoredPairs,
    Training,
    WritablePairs,
    write_pairs,
)
from r2f_ext.types import BaseModel, Target

Options = argparse.Namespace


def run_audit(options: Options) -> dict[str, Any]:
    target, adapters = read_adapters(options.adapter, options)
    base = target.base
    folder = output_folder(options.out)
    config = AuditConfig(
        pairs=options.count,
        routes=options.routes,
        gauss_newton=options.gauss_newton,
        precision=options.precision,
        seed=options.seed,
    )
    proxy = images_of(options.proxy, base, options, "proxy", count=config.pairs)
    private = None if options.private is None else _private(options.private, base, options)
    if private is not None:
        if len(private) < len(adapters):
            raise R2FError(f"--private gives {len(private)} images for {len(adapters)} adapters: give one for each.")
        proxy = drop_private(proxy, private)
    for note in proxy.notes:
        console.print(f"note: {escape(note)}")
    initial = InitialFactors(target, adapters[0], options.initial, options.a0_seed)
    problem = adapter_problem(target, adapters, initial)
    verdicts = verdicts_of(problem)
    print_target({**target_figures(target, verdicts), "steps": _say_steps(problem.steps)})
    with drawn_stages() as stages:
        result = run_audit_stages(target, adapters, proxy, config, stages, initial, verdicts)
    for note in (*result.notes, *(f"{route}: {why}" for route, why in result.not_run.items())):
        console.print(f"note: {escape(note)}")
    if private is not None:
        private = _pair_up(private, next(r for r in result.reconstructions if r.route == "amortised").images.cpu())
    part = set_report(Path(options.adapter[0]).resolve().name, result, proxy, private)
    write_tensors(folder / "gradients.safetensors", result.decoded.dense, {"unit": "the victim's learning rate"})
    done = finish(folder, target, result.verdicts, {proxy.name: result}, [part], [], [], config, result.seconds)
    return _say_finished(done)


def run_demo(options: Options) -> dict[str, Any]:
    if options.base != "embedded":
        raise R2FError("the demo makes its victims on the embedded base: leave --base out, or use r2f audit.")
    folder = output_folder(options.out)
    with drawn_stages() as stages:
        done = demo(folder, AuditConfig(seed=options.seed), chosen_device(options), stages)
    return _say_finished(done)


def run_pairs(options: Options) -> dict[str, Any]:
    target, (adapter,) = read_adapters([options.adapter], options)
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
    return images_of(options.proxy, base, options, "proxy", count=count)


def _training(options: Options) -> Training | None:
    """The victims' training where anything about it was asked; None: one step of SGD on one image."""
    asked = {f.name: getattr(options, f.name) for f in fields(Training) if getattr(options, f.name) is not None}
    return Training(**asked) if asked else None


def run_decode(options: Options) -> dict[str, Any]:
    target, adapters = read_adapters([options.adapter], options)
    folder, decoders = output_folder(options.out), Path(options.decoders)
    pairs, updates = StoredPairs(options.pairs, target.base), stack_updates(adapters)
    if pairs.per_victim_a:
        if pairs.target.layers != target.layers:
            raise R2FError(f"the pairs in '{options.pairs}' are of other layers, rank or alpha: make new ones.")
        seen = AgnosticPairs(pairs, load_core(decoders, pairs))
        updates = seen.view(updates, adapters[0].a)
        decoder = load_decoder(decoders, options.kind, pairs, seen)
    else:
        check_same_a(pairs, adapters[0])
        decoder = load_decoder(decoders, options.kind, pairs)
    decoded = decoder.decode(updates)
    path = folder / "gradients.safetensors"
    write_tensors(path, decoded.dense, {"kind": options.kind, "unit": "the victim's learning rate"})
    norms = {name: float(gradient.norm()) for name, gradient in decoded.dense.items()}
    table("Decoded gradients", ["layer", "norm"], [[name, f"{norm:.3e}"] for name, norm in norms.items()])
    console.print(f"gradients: {escape(str(path))}")
    return {"kind": options.kind, "norms": norms, "file": path.name}


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


def _private(spec: str, base: BaseModel, options: Options) -> ImageSet:
    """`DATA`, or `DATA:INDEX` for one image of it."""
    name, _, index = spec.rpartition(":")
    if not name or not index.isdigit():
        return images_of(spec, base, options, "private", None)
    images = images_of(name, base, options, "private", None)
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
