"""`invert`: images from an adapter's update and stored pairs. `r2f invert` calls it and prints what it returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from r2f_ext.audit.figures import write_images
from r2f_ext.audit.inputs import load_adapters
from r2f_ext.audit.memory import fit_to_memory
from r2f_ext.audit.run import chosen_routes, with_settings
from r2f_ext.config import AuditConfig
from r2f_ext.decoders.store import read_gradients
from r2f_ext.files import output_folder, write_tensors
from r2f_ext.inversion.prior import ScoreDistillation
from r2f_ext.inversion.route import Problem, Proxies, adapter_problem
from r2f_ext.inversion.routes import any_failed, check_runnable, run_routes, verdicts_of
from r2f_ext.inversion.saved_searches import SavedSearches
from r2f_ext.inversion.unet import UNetConfig
from r2f_ext.models import InitialFactors
from r2f_ext.pairs import StoredPairs
from r2f_ext.progress import Stages
from r2f_ext.types import Reconstruction

FEWER = "make fewer pairs (r2f pairs --count {})"  # the remedy if the stored pairs do not fit into memory


@dataclass(frozen=True)
class Inverted:
    """The images of V = 1 adapter.

    Attributes:
        problem: what was inverted.
        reconstructions: one per route that ran, images [V, c, h, w].
        not_run: routes that were asked for and did not run -> the reason.
        far: bool [V], adapters whose update resembles no proxy update.
    """

    problem: Problem
    reconstructions: list[Reconstruction]
    not_run: dict[str, str]
    far: Tensor


def invert(
    adapter: str | Path,
    pairs: str | Path,
    *,
    base: str = "embedded",
    gradients: str | Path | None = None,
    out: str | Path | None = None,
    config: AuditConfig | None = None,
    unet: UNetConfig | None = None,
    prior: str | None = None,
    device: str = "cpu",
    initial: str | None = None,
    a0_seed: int | None = None,
    stages: Stages | None = None,
) -> Inverted:
    """Run the routes that an adapter, stored pairs and decoded gradients allow.

    Args:
        adapter: folder as PEFT's save_pretrained writes it.
        pairs: folder of pairs made with the adapter's A, see `write_pairs`.
        gradients: file of the adapter's decoded gradients, for the route `matching`.
        out: folder for the images, as pictures and in images.safetensors, and for searches in progress; None writes
            nothing.
        config: the routes, their settings and the seed; sizes do not count here.
        unet: refine the amortised estimate by a U-Net; None: kernel ridge alone.
        prior: a diffusers folder, whose model regularises gradient matching.
        base, device, initial, a0_seed, stages: as for `audit`.

    Raises:
        R2FError: an input cannot be read or does not fit the others, memory does not suffice, or no route can run.
    """
    loaded = load_adapters([adapter], base, device)
    target, adapters = loaded.target, loaded.updates
    given = adapter_problem(target, adapters, InitialFactors(target, adapters[0], initial, a0_seed), loaded.facts)
    folder = None if out is None else output_folder(out)
    stored = StoredPairs(pairs, target.base)
    stored.check_same_a(adapters[0])
    asked = replace(config or AuditConfig(), decoder_pairs=0, held_out=0)
    config = fit_to_memory(target, len(adapters), len(stored), asked, fewer=FEWER)
    made_of = repr((stored.fingerprint, unet, config.seed))
    problem = replace(
        with_settings(given, config),
        a=stored.a,
        training=stored.training,
        decoded=None if gradients is None else read_gradients(Path(gradients), target, len(adapters)),
        proxies=Proxies(stored.updates(0, len(stored)), *stored.samples(), target.base.num_classes),
        unet=unet,
        saved=None if folder is None else SavedSearches(folder, made_of),
        prior=None if prior is None else ScoreDistillation.from_folder(prior, seed=config.seed).gradient,
    )
    verdicts, names = verdicts_of(problem), chosen_routes(config)
    check_runnable(problem, verdicts, names)
    outcome = run_routes(problem, verdicts, names, stages)
    assert problem.proxies is not None and problem.observed is not None
    far = problem.proxies.ridge.far_from_proxy(problem.observed, problem.known_labels)
    found = Inverted(problem, outcome.found(), outcome.not_run, far)
    if folder is not None:
        _write(folder, found)
    return found


def _write(folder: Path, found: Inverted) -> None:
    for part in found.reconstructions:
        write_images(folder / f"{part.route}.png", [(part.route, part.images.cpu())])
    write_tensors(folder / "images.safetensors", {part.route: part.images for part in found.reconstructions})
    if found.problem.saved is not None and not any_failed(found.not_run):  # a further run goes on with them
        found.problem.saved.clear()
