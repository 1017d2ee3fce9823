"""Controls of an audit (docs/protocol.md): what is known, or seems to be found, without the audited adapter.

Image controls (mean image, class mean, nearest proxy, another adapter) are compared with the originals as they are.
Simulated controls go through the judged route: adapters of Gaussian noise, and adapters trained on other images of the
same label. A reconstruction that is no nearer to the original than these controls shows nothing of the original.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.audit.assign import assign
from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.decoders import Updates
from r2f_ext.inversion.route import Problem
from r2f_ext.pairs import GeneratedPairs, updates_of

SIMULATED = 200  # adapters of each simulated control
LEAST = 39  # simulated adapters that a rank test at 5 % needs: the smallest p is then 1 / 40
PART = 50  # noise adapters in memory at a time


@dataclass(frozen=True)
class Controls:
    """For each control, its images for n victims, [n, c, h, w] in [0, 1]; None where there is no such control.

    For the simulated controls (`noise_adapter`, `same_label_stranger`) it is each victim's first simulated image.
    """

    mean_image: Tensor
    class_mean: Tensor | None
    nearest_proxy: Tensor
    shuffled_adapter: Tensor
    noise_adapter: Tensor | None = None
    same_label_stranger: Tensor | None = None

    def items(self) -> dict[str, Tensor]:
        return {name: images for name, images in vars(self).items() if images is not None}


@dataclass(frozen=True)
class Simulated:
    """The judged route's images for adapters that hold nothing of the audited images, [m, c, h, w] in [0, 1].

    Attributes:
        noise: images for B with Gaussian entries and the victims' norms, layer by layer.
        strangers: label -> images for adapters of other images with that label.
        labels: int64 [V], the labels that the route found of the audited adapters.
    """

    noise: Tensor
    strangers: dict[int, Tensor]
    labels: Tensor

    def pools(self, rows: slice, labels: Tensor | None) -> dict[str, list[Tensor]]:
        """Control -> the images to draw from for each of the victims `rows`.

        Args:
            labels: the true labels of these victims; for labels that are unknown or not simulated, the found ones are
                used.
        """
        found = self.labels[rows].tolist()
        true = found if labels is None else labels.tolist()
        likely = [one if one in self.strangers else other for one, other in zip(true, found, strict=True)]
        return {
            "noise_adapter": [self.noise] * len(found),
            "same_label_stranger": [self.strangers[label] for label in likely],
        }


def simulated_psnr(pools: list[Tensor], originals: Tensor, candidates: Tensor | None) -> Tensor:
    """PSNR in dB [n, M] of M simulated sets, each with one image for each of n victims.

    Args:
        pools: for each victim its simulated images [m, c, h, w], m >= M; victim v takes image k + v in set k, so that
            victims with the same pool take different images.
        originals: [n, c, h, w], for each victim.
        candidates: all private images, where victims were matched to them: every set is matched in the same way, so
            that matching flatters victims and controls alike. None: the order is known.
    """
    columns = []
    for number in range(min(map(len, pools))):
        images = torch.stack([pool[(number + victim) % len(pool)] for victim, pool in enumerate(pools)])
        truth = originals if candidates is None else candidates[assign(images, candidates)]
        columns.append(psnr_db(images, truth))
    return torch.stack(columns, dim=1)


def make_controls(proxy: ImageSet, labels: Tensor | None, reconstruction: Tensor, shuffled: Tensor) -> Controls:
    """The image controls for n victims.

    Args:
        proxy: the public images.
        labels: [n] true labels of the private images, for the class mean; None: there is no class mean.
        reconstruction: [n, c, h, w]; its nearest proxy image shows whether the route only returns a proxy.
        shuffled: [n, c, h, w], the same route fed with another victim's adapter.

    Returns:
        The mean image replaces the mean of a class without proxies. If no victim's class has proxies, there is no class
        mean.
    """
    images = proxy.batch(slice(None))
    mean = images.mean(0)
    nearest = images[torch.cdist(reconstruction.flatten(1).cpu(), images.flatten(1)).argmin(1)]
    classes = None
    if labels is not None and bool(has_class(proxy, labels).any()):
        classes = torch.stack([_mean_of(images[proxy.labels == label], mean) for label in labels])
    return Controls(mean.expand(len(reconstruction), -1, -1, -1), classes, nearest, shuffled.cpu())


def has_class(proxy: ImageSet, labels: Tensor) -> Tensor:
    """Bool [n]: whether the proxy holds images of each label."""
    return torch.isin(labels, proxy.labels)


def _mean_of(images: Tensor, fallback: Tensor) -> Tensor:
    return images.mean(0) if len(images) else fallback


def simulate(problem: Problem, proxy: ImageSet, labels: Iterable[int], seed: int, precision: str) -> Simulated:
    """Run the amortised route on simulated adapters.

    Args:
        problem: with `observed` and `proxies`; proxy i of `proxies` is image i of `proxy`.
        labels: simulate strangers of these, beside those of the labels that the route finds.
        precision: of the model, see `GeneratedPairs`.

    Raises:
        R2FError: a kernel system of the route is not positive definite.
    """
    assert problem.observed is not None and problem.proxies is not None
    ridge = problem.proxies.ridge
    noise = [ridge.invert(part).images.cpu() for part in noise_updates(problem.observed, SIMULATED, seed)]
    found = ridge.find_labels(problem.observed, problem.known_labels).cpu()
    needed = sorted({*found.tolist(), *labels})
    strangers = {label: _strangers(problem, proxy, label, seed, precision).cpu() for label in needed}
    return Simulated(torch.cat(noise), strangers, found)


def noise_updates(observed: Updates, count: int, seed: int) -> Iterable[Updates]:
    """`count` updates of Gaussian entries in parts of up to PART; number i has the norms of victim i % V, by layer."""
    generator = torch.Generator().manual_seed(seed)
    norms = {name: update.flatten(1).norm(dim=1) for name, update in observed.items()}
    for first in range(0, count, PART):
        numbers = torch.arange(first, min(first + PART, count))
        part = {}
        for name, update in observed.items():
            drawn = torch.randn(len(numbers), *update.shape[1:], generator=generator).to(update)
            wanted = norms[name][(numbers % len(update)).to(update.device)]
            part[name] = drawn * (wanted / drawn.flatten(1).norm(dim=1)).view(-1, *[1] * (drawn.ndim - 1))
        yield part


def _strangers(problem: Problem, proxy: ImageSet, label: int, seed: int, precision: str) -> Tensor:
    """Estimates [m, c, h, w] for proxies of one label, each from a fit without it.

    Strangers train for one step of plain SGD on one image, like the proxies. If the proxy has too few images of the
    label, images of other labels are used with this label.
    """
    proxies, target, a = problem.proxies, problem.target, problem.a
    assert proxies is not None and target is not None and a is not None
    own = torch.nonzero(proxies.labels == label).flatten()
    few = len(own) < LEAST
    candidates = torch.arange(len(proxies.labels), device=own.device) if few else own
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).to(own.device)
    rows = candidates[order[:SIMULATED]]
    if not few:
        updates = {name: update[rows] for name, update in proxies.updates.items()}
    else:
        pairs = GeneratedPairs(target, a, proxy.take(rows.cpu()).relabelled(label), precision=precision)
        updates = updates_of(pairs)
    return proxies.ridge.invert_without(updates, label, rows)
