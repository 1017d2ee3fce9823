"""`audit`: what adapters reveal of their training images. `r2f audit` calls it and prints progress and report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from r2f_ext.audit import run
from r2f_ext.audit.inputs import load_adapters, load_private
from r2f_ext.audit.record import Inputs, command_of, public_name
from r2f_ext.audit.report import AuditReport
from r2f_ext.audit.sets import set_report
from r2f_ext.audit.write import replacing_report, write_report
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, drop_private, images_for
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder
from r2f_ext.gpu import float32_products
from r2f_ext.inversion.near_images import generated_nearby
from r2f_ext.inversion.route import Public, Verdict, adapter_problem
from r2f_ext.inversion.routes import any_failed, default_routes, needs, verdicts_of
from r2f_ext.inversion.saved_searches import SavedSearches
from r2f_ext.models import Evidence, InitialFactors
from r2f_ext.pairs.generate import check_precision
from r2f_ext.progress import Stages
from r2f_ext.types import LoraUpdate, Target


@dataclass(frozen=True)
class Prepared:
    """The inputs and verdicts of an audit, before the long stages.

    Attributes:
        target, updates: base, adapted layers and the V adapters' factors.
        proxy: public images, from which the private ones are removed.
        private: the true images, at least V, or None.
        verdicts: route -> verdict, of every route in the registry.
        evidence: what the factors show of the training.
    """

    target: Target
    updates: list[LoraUpdate]
    proxy: ImageSet
    private: ImageSet | None
    verdicts: dict[str, Verdict]
    evidence: Evidence


@float32_products()
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
        base: `embedded`, `timm:NAME`, `timm-random:NAME`, `transformers:OWNER/NAME` or a folder, see `load_base`.
        proxy: public images, see `load_images`.
        private: the true training images to score against, as `proxy`, or `DATA:INDEX,...` with one index for each
            adapter.
        out: folder for report.json, report.html, reconstructions.png and the decoded gradients; None writes nothing.
        config: sizes and seeds; None takes the defaults of `AuditConfig`.
        device: where the model runs, "cpu", "cuda" or "cuda:N".
        initial: folder of the adapter saved before training, for the route adapter_rowspace.
        a0_seed: torch's seed right before PEFT made the adapter; without both, common seeds are tried.
        stages: reports the progress of the long stages.
        on_ready: called once everything is loaded and checked, before the long stages.

    Raises:
        R2FError: an input cannot be read or does not fit the others, or memory does not suffice.
    """
    began = time.perf_counter()
    folder = None if out is None else output_folder(out)
    config, stages = config or AuditConfig(), stages or Stages()
    loaded = load_adapters(adapters, base, device)
    target, updates = loaded.target, loaded.updates
    check_precision(config.precision, target.base.device)
    start = InitialFactors(target, updates[0], initial, a0_seed)
    problem = adapter_problem(target, updates, start, loaded.facts)
    evidence = problem.evidence
    assert evidence is not None
    images, originals = _load_images(target, len(updates), proxy, private, config)
    verdicts = verdicts_of(problem)
    if needs("public", run.chosen_routes(config), verdicts):
        images, public = _public(images, originals, proxy, target, config)
        problem = replace(problem, public=public)
    if folder is not None:
        used = (images.fingerprint, problem.public and problem.public.fingerprint, config.precision, config.seed)
        problem = replace(problem, saved=SavedSearches(folder, repr(used)))
    on_ready(Prepared(target, updates, images, originals, verdicts, evidence))
    labels = originals.labels if originals is not None and originals.labels_known else None
    given = Inputs(tuple(map(str, adapters)), base, proxy, private, initial, a0_seed, target.base.device.type)
    recorded = given.relative_to(folder or Path())
    with nullcontext() if folder is None else replacing_report(folder):
        result = run.run_audit_stages(problem, images, config, stages, verdicts, labels)
        report = AuditReport(
            results={images.name: result},
            sets=[set_report(Path(adapters[0]).resolve().name, result, images, originals)],
            seconds={**result.seconds, "total": time.perf_counter() - began},
            inputs=recorded,
            command=command_of(recorded, result.config),
            facts=loaded.facts,
            notes=(
                *target.base.notes,
                *images.notes,
                *result.notes,
                *(
                    f"{route}: {why}"
                    for route, why in result.not_run.items()
                    if _unexpected(route, why, verdicts, config)
                ),
            ),
        )
        if folder is not None:
            write_report(folder, report)
            if problem.saved is not None and not any_failed(result.not_run):  # a further run goes on with them
                problem.saved.clear()
    return report


def _unexpected(route: str, why: str, verdicts: dict[str, Verdict], config: AuditConfig) -> bool:
    """Whether to report that a route did not run: false for a default route that its count refuses."""
    named = config.routes is not None or route not in default_routes()
    return named or why != verdicts[route].why


def _public(
    images: ImageSet, originals: ImageSet | None, proxy: str, target: Target, config: AuditConfig
) -> tuple[ImageSet, Public | None]:
    """All public images if they allow a better start than `images`, the proxy of the pairs; otherwise None.

    The proxy is returned with a note where not all could be loaded.
    """
    try:
        whole = images_for(target.base, proxy, seed=config.seed)
        whole = whole if originals is None else drop_private(whole, originals)
    except R2FError as error:
        why = _without_folders(str(error), proxy)
        return images.noted(f"The search starts from the proxy pairs, not from all public images: {why}"), None
    whole = max(whole, images, key=len)  # more generated images may be asked for than are made by default
    if not (len(whole) > len(images) or whole.random_labels):
        return images, None
    generated = generated_nearby(target.base, proxy, config.seed)
    return images, Public(whole, generated, None if originals is None else originals.images)


def _load_images(
    target: Target, victims: int, proxy: str, private: str | None, config: AuditConfig
) -> tuple[ImageSet, ImageSet | None]:
    """The proxy without any private image, and the private images."""
    images = images_for(target.base, proxy, count=config.pairs, seed=config.seed)
    originals = None if private is None else load_private(private, target.base, config.seed, victims)
    if originals is not None:
        images = drop_private(images, originals)
    notes = tuple(_without_folders(note, proxy) for note in images.notes)
    return replace(images, name=public_name(proxy), notes=notes), originals


def _without_folders(note: str, proxy: str) -> str:
    """A note on the proxy that names its folders by their last part only: reports hold no absolute path."""
    for part in (proxy, *proxy.split("+")):
        note = note.replace(part, public_name(part))
    return note
