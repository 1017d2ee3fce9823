"""Two further bases of the embedded architecture, for questions about other weights: trained once and kept."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r2f_ext.data import FAMILIES, load_images, procedural_families, procedural_images
from r2f_ext.files import cache_folder, output_folder, write_atomically, write_text
from r2f_ext.json_file import read_json_file
from r2f_ext.models import load_base, save_base
from r2f_ext.models.embedded import ARCHITECTURE, MODEL_ARGS, reset_head
from r2f_ext.models.pretrain import Pretraining, classification_accuracy, pretrain
from r2f_ext.types import BaseModel

FACTS = "pretraining.json"
OBJECTS = FAMILIES.index("objects")


@dataclass(frozen=True)
class Recipe:
    """How a base is made.

    Attributes:
        images: what it is trained on, as `load_images` names it. The labels are the images' own; procedural images have
            none, so they get those of a pretext task (`turned_families`).
        count: number of images; a tenth of them is held out to measure the accuracy.
        training: how all weights are trained. Afterwards the head is reset, as in the embedded base.
    """

    images: str
    count: int
    training: Pretraining

    @property
    def digest(self) -> str:
        """Twelve hex digits that differ between recipes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


TRAINED = {
    "embedded-seed1": Recipe("embedded", 10_000, Pretraining(steps=600, seed=1)),
    "embedded-procedural": Recipe("procedural", 20_000, Pretraining(steps=600, seed=2)),
}
BASES = ("embedded", *TRAINED)
QUICK_COUNT, QUICK_STEPS, QUICK_BATCH = 200, 4, 16


def recipe_of(name: str, quick: bool) -> Recipe:
    """The recipe of a base of TRAINED; a quick one takes seconds, and its weights are close to random."""
    recipe = TRAINED[name]
    if not quick:
        return recipe
    training = replace(recipe.training, steps=QUICK_STEPS, batch=QUICK_BATCH)
    return replace(recipe, count=QUICK_COUNT, training=training)


def trained_base(name: str, device: torch.device, quick: bool = False) -> BaseModel:
    """A base of TRAINED. If it has no folder under `cache_folder()` yet, it is trained and saved there.

    Training takes about two minutes on two cores and says so on stderr.

    Args:
        name: a key of TRAINED; quick: train for seconds only, and save it in a folder of its own.

    Raises:
        R2FError: the folder cannot be written to, or what it holds cannot be read.
    """
    recipe = recipe_of(name, quick)
    folder = cache_folder() / "bases" / f"{name}-{recipe.digest}"
    if not folder.is_dir():
        output_folder(folder.parent)
        write_atomically(folder, lambda temporary: _train(name, recipe, temporary))
    facts = read_json_file(folder / FACTS, "damaged", "remove its folder, and it is trained again")
    note = (
        f"The base '{name}' was trained on {facts['images']} images of '{recipe.images}' for {recipe.training.steps} "
        f"steps and labels {facts['accuracy']:.1%} of {facts['held_out']} others correctly."
    )
    return replace(load_base(str(folder), device), spec=name, notes=(note,))


def turned_families(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Procedural images uint8 [count, 3, 32, 32] and their labels [count] for a pretext task to train on.

    The label is the generator's family. Objects, which have an upright orientation, are also rotated by 0 to 3 quarter
    turns, and each rotation is a class of its own (Gidaris et al. 2018): seven classes.
    """
    images, labels = procedural_images(count, seed=seed), procedural_families(count, seed=seed)
    turns = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))
    for turn in range(4):
        rows = (labels == OBJECTS) & (turns == turn)
        images[rows] = images[rows].rot90(turn, (2, 3))
    return images, torch.where(labels == OBJECTS, len(FAMILIES) - 1 + turns, labels - (labels > OBJECTS).long())


def _train(name: str, recipe: Recipe, folder: Path) -> None:
    began, steps = time.monotonic(), recipe.training.steps
    print(f"Training the base '{name}' once, {steps} steps ...", file=sys.stderr, flush=True)
    if recipe.images == "procedural":
        images, labels = turned_families(recipe.count, recipe.training.seed)
    else:
        loaded = load_images(recipe.images, count=recipe.count, seed=recipe.training.seed)
        images, labels = loaded.images, loaded.labels
    fitted = recipe.count - recipe.count // 10
    model = pretrain(images[:fitted], labels[:fitted], recipe.training)
    accuracy = classification_accuracy(model, images[fitted:], labels[fitted:])
    reset_head(model)
    save_base(replace(load_base("embedded"), model=model), folder, ARCHITECTURE, MODEL_ARGS)
    facts = {"recipe": asdict(recipe), "images": fitted, "held_out": recipe.count - fitted, "accuracy": accuracy}
    write_text(folder / FACTS, json.dumps(facts, indent=2))
    taken = time.monotonic() - began
    print(f"... {taken:.0f} s; accuracy on held-out images {accuracy:.3f}.", file=sys.stderr, flush=True)
