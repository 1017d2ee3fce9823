"""A report written by hand: its figures, and the pictures that belong to it."""

from dataclasses import asdict

import torch

from r2f_ext.audit.accuracy import DecoderFigures
from r2f_ext.audit.base_check import BaseCheck
from r2f_ext.audit.controls import Controls
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.record import Inputs
from r2f_ext.audit.schema import (
    SCHEMA,
    ClosedFormFigures,
    NotTried,
    PairFigures,
    ProxyFigures,
    ReportFigures,
    RouteFigures,
    SetFigures,
    TargetFigures,
    VerdictFigures,
)
from r2f_ext.audit.sets import SetReport
from r2f_ext.audit.spectra import Spectrum
from r2f_ext.audit.verdict import Comparison, ExactImage
from r2f_ext.config import AuditConfig
from r2f_ext.inversion.exactness import Exactness
from r2f_ext.models import AdapterFacts
from r2f_ext.types import AdaptedLayer, Reconstruction

LAYERS = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
EXACT = Exactness(True, 78.2, 0, "exact to 78 dB")
FREE = Exactness(False, None, 365, "determined up to 365 directions")


def smooth(count, shape, seed):
    """[count, *shape], blurred noise in [0, 1]."""
    noise = torch.rand(count, shape[0], 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, shape[1:], mode="bicubic").clamp(0, 1)


def victims(count=1, shape=(1, 32, 32), name="my-adapter", private=True, exact=True):
    """(set, its figures)."""
    originals = smooth(count, shape, 0)
    routes = {"gauss_newton": originals + 1e-5, "amortised": 0.7 * originals + 0.3 * smooth(count, shape, 1)}
    labels = torch.arange(count) % 10
    found = [
        Reconstruction(route, images, labels, f"Why {route}.", 1.0)
        for route, images in list(routes.items())[not exact :]
    ]
    controls = None
    if private:
        images = smooth(1, shape, 2).expand(count, -1, -1, -1)
        controls = Controls(**dict.fromkeys(Controls.__dataclass_fields__, images))
    part = SetReport(
        name, "procedural", count, found, originals if private else None, labels if private else None, controls
    )
    scores = {"psnr_db_mean": 23.4, "psnr_db_std": 1.2, "psnr_db_median": 23.0, "ssim_mean": 0.81}
    scores |= {"psnr_db": [23.4] * count, "ssim": [0.81] * count, "label_accuracy": 0.5}
    exactness = [FREE if i % 3 == 2 else EXACT for i in range(count)]
    figures = SetFigures(
        n=count,
        proxy="procedural",
        routes={
            one.route: RouteFigures(
                one.why,
                {},
                {},
                exactness if one.route == "gauss_newton" else None,
                **(scores if private else {}),
            )
            for one in found
        },
        controls={key: 9.1 + i for i, key in enumerate(controls.items())} if controls else {},
        control_intervals={
            "shuffled_adapter": Comparison(1.3, (0.4, 2.2), 0.005, 199),
            "mean_image": Comparison(3.2, None, None, None),
        }
        if controls
        else {},
        judged_route="amortised",
        leak=True if private else None,
        verdict="The adapter gave away 1.3 dB.",
        sentences=["The adapter gave away 1.3 dB."],
        pairing="Victims and private images are paired by assignment on the reconstructions." if private else None,
        far_from_proxy=[False] * count,
        notes=["The update lies far from every proxy update."],
    )
    return part, figures


def report(sets, phase0=(), adapters=None):
    """The figures of a report on sets of `victims`."""
    figures = DecoderFigures(0.93, 0.88, 0.1, 0.7, victim_true=0.65, class_mean_cosine=0.76, floor_cosine=0.3)
    decoders = {layer: dict.fromkeys(("projection", "row_lmmse", "ridge"), figures) for layer in LAYERS}
    exact = [
        ExactImage(part.name, i, route, **asdict(one))
        for part, figures in sets
        for route, values in figures.routes.items()
        for i, one in enumerate(values.exact or [])
    ]
    total, pairs, seconds = sum(part.count for part, _ in sets), PairFigures(3000, 1234.5), {"pairs": 10.0}
    notes, leaks = ("Keys lost a prefix.",), ("optimizer.pt lies beside it.",)
    return ReportFigures(
        schema=SCHEMA,
        date="2026-01-02T03:04:05Z",
        command="r2f audit my-adapter --out report",
        verdict=VerdictFigures(
            leak=True,
            beyond_control_db=1.3,
            interval_db=(0.4, 2.2),
            confidence=0.95,
            p_value=0.005,
            judged_route="amortised",
            exact=exact,
            threat_model={"amortised": "Anyone who has the adapter and the public base."},
            tried=["amortised"],
            not_tried=[NotTried("matching", "It was not asked for.")],
            sentences=[
                "One image is recovered exactly, to 78 dB.",
                "The adapter gives away 1.3 dB (0.4 to 2.2).",
                "This is no proof of safety.",
            ],
        ),
        failed={},
        incomplete=None,
        versions={"r2f_ext": "0.0", "torch": "2.9"},
        backend={"gram": "cpu"},
        target=TargetFigures(
            base="embedded",
            rank=16,
            layers=[AdaptedLayer(name, 128, 128, 8 + 8 * (i % 2), 2.0) for i, name in enumerate(LAYERS)],
            tokens=65,
            identifiable={"gauss_newton": True, "patch_position": False},
            why={
                "gauss_newton": "12,288 equations for 1,024 unknowns.",
                "patch_position": "No gradient is observed.",
            },
        ),
        phase0=[one.figures for one in phase0],
        decoders=decoders,
        reconstruction={part.name: figures for part, figures in sets},
        pairs=pairs,
        seconds={**seconds, "total": 61.5},
        proxies={"procedural": ProxyFigures(decoders, pairs, seconds)},
        spectra={name: Spectrum(0.012, [0.7**i for i in range(8)], 6) for name in LAYERS},
        config=AuditConfig(pairs=3000, gauss_newton=True),
        inputs=Inputs(("../my-adapter",), "embedded", "procedural", None, None, None, "cpu"),
        base_check=BaseCheck(None, (), None, (None,) * total, ()),
        notes=["A sentence on the run."],
        adapters=adapters or [AdapterFacts(f"adapter-{i}", notes, leaks) for i in range(total)],
        device="cpu",
    )


def closed_forms(part):
    return [Phase0Report(ClosedFormFigures("patch_position", 100.0, 90.0, 0.1, "A closed form."), part.originals)]
