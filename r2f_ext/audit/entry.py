"""`audit`: what do these adapters give away? `r2f audit` is this function with its progress and report printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r2f_ext.audit import run
from r2f_ext.audit.inputs import load_adapters, load_private
from r2f_ext.audit.memory import fit_to_memory
from r2f_ext.audit.record import Inputs, public_name
from r2f_ext.audit.report import AuditReport, set_report
from r2f_ext.audit.row_space import run_row_space
from r2f_ext.audit.write import write_report
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.files import output_folder
from r2f_ext.inversion.gauss_newton import obstacle
from r2f_ext.inversion.identifiability import RouteVerdict, identifiability
from r2f_ext.models import untouched_a
from r2f_ext.progress import Stages
from r2f_ext.types import LoraUpdate, Target


@dataclass(frozen=True)
class Prepared:
    """What an audit has loaded and decided before any time is spent.

    Attributes:
        target, updates: base, adapted layers and the V adapters' factors.
        proxy: public images, none of them private.
        private: the true images, at least V, or None.
        verdicts: route -> whether it can work.
        one_step: every A is as PEFT draws it, so one step was taken.
        config: the sizes and seeds that will run.
        notes: sentences on the images and on routes that were asked for and refused.
    """

    target: Target
    updates: list[LoraUpdate]
    proxy: ImageSet
    private: ImageSet | None
    verdicts: dict[str, RouteVerdict]
    one_step: bool
    config: AuditConfig
    notes: tuple[str, ...]


def audit(
    adapters: Sequence[str | Path],
    *,
    base: str = "embedded",
    proxy: str = "procedural",
    private: str | None = None,
    out: str | Path | None = None,
    config: AuditConfig | None = None,
    device: str = "cpu",
    initial: str | None = None,
    a0_seed: int | None = None,
    stages: Stages | None = None,
    on_ready: Callable[[Prepared], None] = lambda ready: None,
) -> AuditReport:
    """Audit one adapter, or several that started from the same A (the clients of one server).

    Args:
        adapters: folders as PEFT's save_pretrained writes them.
        base: `embedded`, `timm:NAME` or a folder, see `load_base`.
        proxy: public images, see `load_images`.
        private: the true training images to score against, as `proxy`, or `DATA:INDEX` for one of them.
        out: folder for report.json, report.html, reconstructions.png and the decoded gradients; None writes nothing.
        config: sizes and seeds; None takes the defaults of `AuditConfig`.
        device: where the model runs, "cpu" or "cuda".
        initial: folder of the adapter saved before training, for the route adapter_rowspace.
        a0_seed: torch's seed right before PEFT made the adapter; without both, common seeds are tried.
        stages: takes the progress of the long stages.
        on_ready: called once everything is loaded and checked, before the long stages.

    Raises:
        R2FError: an input cannot be read or does not fit the others, or memory does not suffice.
    """
    began = time.perf_counter()
    folder = None if out is None else output_folder(out)
    config, stages = config or AuditConfig(), stages or Stages()
    ready = _prepare(adapters, base, proxy, private, config, device)
    on_ready(ready)
    row_space = run_row_space(ready.target, ready.updates, initial, a0_seed)
    result = run.audit(ready.target, ready.updates, ready.proxy, ready.config, stages)
    notes = ready.notes
    if row_space.found is None:
        notes += (f"adapter_rowspace: {row_space.why}",)
    else:
        result = replace(result, reconstructions=[*result.reconstructions, row_space.found])
    given = Inputs(tuple(map(str, adapters)), base, proxy, private, initial, a0_seed, ready.target.base.device.type)
    report = AuditReport(
        target=ready.target,
        verdicts=ready.verdicts,
        results={ready.proxy.name: result},
        sets=[set_report(Path(adapters[0]).resolve().name, result, ready.proxy, ready.private)],
        config=ready.config,
        seconds={**result.seconds, "total": time.perf_counter() - began},
        inputs=given.relative_to(folder or Path()),
        notes=notes,
    )
    if folder is not None:
        write_report(folder, report)
    return report


def _prepare(
    adapters: Sequence[str | Path], base: str, proxy: str, private: str | None, config: AuditConfig, device: str
) -> Prepared:
    target, updates = load_adapters(adapters, base, device)
    one_step = all(untouched_a(update) for update in updates)
    verdicts = identifiability(target.base, adapter=target, steps=1 if one_step else None)
    images = load_images(
        proxy,
        input_shape=target.base.input_shape,
        num_classes=target.base.num_classes,
        count=config.pairs,
        seed=config.seed,
    )
    originals = None if private is None else load_private(private, target.base, config.seed, len(updates))
    if originals is not None:
        images = drop_private(images, originals)
    notes = tuple(_without_folders(note, proxy) for note in images.notes)
    if config.gauss_newton:
        refusal = obstacle(target, updates)
        config = replace(config, gauss_newton=refusal is None)
        notes += () if refusal is None else (f"gauss_newton is refused: {refusal}.",)
    config = fit_to_memory(target, len(updates), min(config.pairs, len(images)), config)
    images = replace(images, name=public_name(proxy))
    return Prepared(target, updates, images, originals, verdicts, one_step, config, notes)


def _without_folders(note: str, proxy: str) -> str:
    """A note on the proxy that names its folders by their last part only: reports hold no absolute path."""
    for part in (proxy, *proxy.split("+")):
        note = note.replace(part, public_name(part))
    return note
