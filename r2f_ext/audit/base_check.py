"""Whether an update can come from the weights of the base: a relation that holds for every image.

Attention maps the values V_h [N, e/H] of head h to P_h V_h, whatever P_h is, and the output projection W_o [d, e] reads
the heads side by side. With D [N, d] the loss gradients at its outputs, those at the values are P_h^T D W_o,h. Where
the classifier reads the class token alone, D of the last block has one row d, and one step on one image leaves
    B_o = d (A_o y)^T        B_v,h = (W_o,h^T d) (A_v x_h)^T        (up to the learning rate and the scales)
for any image, label and learning rate. B_o shows d, so each head's columns of B_v are known from W_o alone: the
relative residual is the part of B_v outside of them. It is rounding at the right weights and about sqrt(1 - H/e) at
unrelated ones. That D has one row is measured (`Problem.effective_tokens`), and that the layers are those of the
relation is tested on updates of proxy images at this base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r2f_ext.decoders import Updates
from r2f_ext.errors import R2FError, expected, listed, reason
from r2f_ext.inversion.route import Problem
from r2f_ext.types import Target

PROXIES = 16  # updates of proxy images that the relation is tested on
HOLDS = 0.02  # largest residual of these; their factors in bfloat16 leave up to 0.004
FLOOR = 2.0**-7  # singular values below this share of the norm are rounding, as of training in bfloat16
UNRELATED = 0.1  # residual from which rounding explains nothing; training in bfloat16 or float16 leaves up to 0.004
LEAST_WIDTH = 4  # of a head: narrower ones hardly constrain
HEADS = ("num_heads", "num_attention_heads")  # where an attention says how many heads it has
NO_LAYER = (
    "The weights of the base are not checked: the relation that tests them needs a classifier that reads the class "
    "token alone, and the values and the output projection of the last block among the adapted layers."
)
NO_PROXIES = "The weights of the base are not checked: there are no proxy pairs to test the relation on."
OTHER_LAYERS = "The weights of other layers, the classifier's too, are not checked by this."


@dataclass(frozen=True)
class Relation:
    """An output projection W_o [d, e] and the layer that makes the values that it reads.

    Attributes:
        outer, inner: names of the two adapted layers.
        values: the rows of the inner layer's output that are values.
        heads: number of heads, H.
        weight: W_o, float64.
    """

    outer: str
    inner: str
    values: slice
    heads: int
    weight: Tensor


@dataclass(frozen=True)
class Residual:
    """How V updates obey a relation.

    Attributes:
        relative: float64 [V], the share of the norm of B_v outside of the columns that W_o allows.
        directions: int64 [V], singular values of B_o above rounding; one image leaves one.
        one_image: bool [V], B_o and each head of B_v have one direction, as after one step on one image.
    """

    relative: Tensor
    directions: Tensor
    one_image: Tensor


@dataclass(frozen=True)
class BaseCheck:
    """Whether the updates of V adapters fit the base's weights.

    Attributes:
        layer: the output projection whose weights were tested; None: none can be.
        residuals: of each victim; empty where no layer was tested.
        at_most: the largest residual among updates of proxy images, made on this base.
        fits: True: the update fits to rounding. False: no image explains it at these weights. None: not decided.
        sentences: the result in words, the foreign updates first.
    """

    layer: str | None
    residuals: tuple[float, ...]
    at_most: float | None
    fits: tuple[bool | None, ...]
    sentences: tuple[str, ...]

    @property
    def foreign(self) -> Tensor:
        """Bool [V]: victims whose update cannot come from this base."""
        return torch.tensor([one is False for one in self.fits])

    @property
    def refusal(self) -> str | None:
        """The sentence on the foreign updates; None where there are none."""
        return self.sentences[0] if any(self.foreign) else None

    @property
    def notes(self) -> tuple[str, ...]:
        """The other sentences."""
        return self.sentences[self.refusal is not None :]

    @property
    def confirmed(self) -> Tensor:
        """Bool [V]: victims whose update fits the tested weights."""
        return torch.tensor([one is True for one in self.fits])


def check_base(problem: Problem) -> BaseCheck:
    """Test the adapters of a problem, with `observed`, `adapters`, `evidence` and `proxies`, against its base."""
    failed = "The weights of the base could not be checked:"
    try:
        return _check(problem)
    except torch.linalg.LinAlgError as error:
        return _undecided(problem.victims, f"{failed} {reason(error)}.")
    except (R2FError, RuntimeError, MemoryError) as error:
        return _undecided(problem.victims, f"{failed} {expected(error)}")


def _check(problem: Problem) -> BaseCheck:
    target, proxies, evidence = problem.target, problem.proxies, problem.evidence
    assert target is not None and problem.observed is not None and problem.adapters
    if proxies is None:
        return _undecided(problem.victims, NO_PROXIES)
    made = {
        layer.name: proxies.updates[layer.name][:PROXIES].unflatten(1, (layer.d_out, -1)) for layer in target.layers
    }
    one_token = [one for one in relations(target) if problem.effective_tokens[one.outer] == 1]
    for relation in one_token:
        on_proxies = residual(relation, made)
        at_most = float(on_proxies.relative.max())
        if bool(on_proxies.one_image.all()) and at_most <= HOLDS:
            break
    else:
        return _undecided(problem.victims, NO_LAYER)
    found = residual(relation, problem.observed)
    one_step = evidence is not None and evidence.steps == 1 and not evidence.signs_only
    rounding = 4 * max(at_most, torch.finfo(problem.adapters[0].stored).eps)
    fits: list[bool | None] = []
    for relative, one_image in zip(found.relative.tolist(), found.one_image.tolist(), strict=True):
        refuted = one_step and one_image and relative >= UNRELATED and target.layer(relation.outer).rank > 1
        fits.append(True if relative <= rounding else False if refuted else None)
    sentences = tuple(_sentences(relation.outer, found, fits, at_most, one_step))
    return BaseCheck(relation.outer, tuple(found.relative.tolist()), at_most, tuple(fits), sentences)


def relations(target: Target) -> Iterator[Relation]:
    """Pairs of adapted layers of one attention that may obey the relation, the last first; proxies show which do."""
    modules = dict(target.base.model.named_modules())
    for outer in reversed(target.layers):
        projection = modules[outer.name]
        if not isinstance(projection, nn.Linear):
            continue
        attention = outer.name.rpartition(".")[0]
        heads = next((int(n) for key in HEADS if isinstance(n := getattr(modules[attention], key, None), int)), 0)
        if heads < 1 or outer.d_in % heads or outer.d_in // heads < LEAST_WIDTH:
            continue
        for inner in target.layers:
            together = inner.name.rpartition(".")[0] == attention and inner.name != outer.name
            if together and inner.d_out in (outer.d_in, 3 * outer.d_in):
                values = slice(inner.d_out - outer.d_in, inner.d_out)  # of one layer for q, k and v: the last third
                yield Relation(outer.name, inner.name, values, heads, projection.weight.detach().double())


def residual(relation: Relation, updates: Updates) -> Residual:
    """The residuals of updates, name -> [V, d_out, r], by a relation."""
    outer = updates[relation.outer].double()
    inner = updates[relation.inner][:, relation.values].double().unflatten(1, (relation.heads, -1))  # [V, H, e/H, r]
    left, sizes, _ = torch.linalg.svd(outer, full_matrices=False)
    directions = (sizes > FLOOR * sizes.norm(dim=1, keepdim=True)).sum(1)
    total = inner.flatten(1).norm(dim=1).clamp_min(1e-300)
    columns = (left[:, :, 0] @ relation.weight).unflatten(1, (relation.heads, -1))  # of d alone
    columns = columns / columns.norm(dim=2, keepdim=True).clamp_min(1e-300)
    outside = inner - columns[..., None] * (columns[:, :, None] @ inner)
    others = torch.linalg.svdvals(inner)[..., 1:].flatten(1).norm(dim=1) / total
    return Residual(outside.flatten(1).norm(dim=1) / total, directions, (directions == 1) & (others <= FLOOR))


def _undecided(victims: int, why: str) -> BaseCheck:
    return BaseCheck(None, (), None, (None,) * victims, (why,))


def _sentences(layer: str, found: Residual, fits: list[bool | None], at_most: float, one_step: bool) -> Iterator[str]:
    """Sentences on the adapters that fit, on those that cannot, and on those for which this is not decided."""
    several = len(fits) > 1
    relative = found.relative

    def who(rows: list[int]) -> str:
        return f"{len(rows)} of {len(fits)} updates" if several else "The update"

    foreign = [i for i, one in enumerate(fits) if one is False]
    if foreign:
        numbers = f" (number{'s' * (len(foreign) > 1)} {listed([str(i + 1) for i in foreign])})"
        which = f"{who(foreign)}{numbers * (len(foreign) < len(fits))}"
        least = float(relative[foreign].min())
        yield (
            f"{which} cannot come from one step of plain SGD on one image at this base's weights of {layer}, whatever "
            f"the image: the relation that they force is broken by {least:.0%} of the norm{' or more' * several}, and "
            f"by {at_most:.1g} of it at most in updates made on this base. Pass the base that the adapter was trained "
            "on."
        )
    fitting = [i for i, one in enumerate(fits) if one is True]
    if fitting:
        fit = "fits" if len(fitting) == 1 else "fit"
        yield (
            f"{who(fitting)} {fit} the base's weights of {layer}: the relation that they force on any image holds to "
            f"{float(relative[fitting].max()):.1g} of the norm, as in updates made on this base. {OTHER_LAYERS}"
        )
    open_ = [i for i, one in enumerate(fits) if one is None]
    if open_:
        most, least = float(relative[open_].max()), int(found.directions[open_].min())
        holds = f"the relation that the weights of {layer} force holds only to {most:.1g} of the norm"
        if not one_step:
            why = f"{holds}, and more than one step, or another optimiser than plain SGD, breaks it too."
        elif bool(found.one_image[open_].all()) and most < UNRELATED:
            why = f"{holds}: slightly other weights, several like images, or training in low precision."
        else:
            why = (
                f"{holds}, and B of {layer} has {least} direction{'s' * (least != 1)}{' or more' * several}: one step "
                "on one image leaves one in it and in each head's values; several images, several steps and noise "
                "leave more."
            )
        yield f"Whether the base's weights are those of the training is not decided for {who(open_).lower()}: {why}"
