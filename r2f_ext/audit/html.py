"""report.html: one self-contained file, images inline, every text escaped."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from r2f_ext.audit.figures import png_bytes, row_name, rows_of
from r2f_ext.audit.report import SetReport
from r2f_ext.files import write_text

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#1b1b1b}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child,td.why,th.why{text-align:left}.control{color:#b03020}.scroll{overflow-x:auto}
img{image-rendering:pixelated;width:56px;height:56px;display:block}.pictures td{padding:1px;border:0}
.pictures td:first-child{padding-right:.8rem;white-space:nowrap}.verdict{font-weight:600}.note{color:#8a5a00}
"""


def write_html(path: Path, report: dict[str, Any], sets: list[SetReport], phase0: list[tuple[str, Tensor]]) -> None:
    """Write the report for a browser; it loads nothing from anywhere."""
    body = [
        "<h1>What this adapter gave away</h1>",
        _target(report["target"]),
        *(_set(part, report["reconstruction"][part.name]) for part in sets),
        _phase0(report["phase0"], phase0),
        _decoders(report),
        _versions(report),
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>r2f-ext report</title>"
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
    write_text(path, page)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cells(kind: str, row: list[str]) -> str:
        classes = [" class=why" if name == "why" else "" for name in head]
        return "".join(f"<{kind}{name}>{escape(cell)}</{kind}>" for name, cell in zip(classes, row, strict=True))

    lines = "".join(
        f"<tr{' class=control' if row[0].startswith('control') else ''}>{cells('td', row)}</tr>" for row in rows
    )
    return f"<div class=scroll><table><tr>{cells('th', head)}</tr>{lines}</table></div>"


def _target(target: dict[str, Any]) -> str:
    lead = (
        f"Base {target['base']}, {len(target['layers'])} adapted layers, rank {target['rank']}, "
        f"{target['tokens']} tokens."
    )
    rows = [[route, "yes" if ok else "no", target["why"][route]] for route, ok in target["identifiable"].items()]
    return f"<p>{escape(lead)}</p><h2>Which routes can work, by count</h2>" + _table(
        ["route", "equations suffice", "why"], rows
    )


def _set(part: SetReport, figures: dict[str, Any]) -> str:
    rows = []
    for route, values in figures["routes"].items():
        if values["psnr_db_mean"] is None:
            rows.append([row_name(route), "not scored", "", ""])
        else:
            rows.append([row_name(route), *_decibels(values)])
    rows += [[row_name(name), f"{value:.2f}", "", ""] for name, value in figures["controls"].items()]
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in figures["notes"])
    return (
        f"<h2>{escape(part.name)} (proxy: {escape(part.proxy)})</h2>"
        f"<p class=verdict>{escape(figures['verdict'])}</p>{notes}{_pictures(rows_of(part))}"
        + _table(["route", "PSNR dB", "std", "SSIM"], rows)
    )


def _decibels(values: dict[str, Any]) -> list[str]:
    return [f"{values['psnr_db_mean']:.2f}", f"{values['psnr_db_std']:.2f}", f"{values['ssim_mean']:.3f}"]


def _pictures(rows: list[tuple[str, Tensor]]) -> str:
    lines = []
    for key, images in rows:
        name = row_name(key)
        cells = "".join(
            f"<td><img alt='{escape(name)} {i}' src='{_inline(image)}'></td>" for i, image in enumerate(images)
        )
        lines.append(f"<tr{' class=control' if name.startswith('control') else ''}><td>{escape(name)}</td>{cells}</tr>")
    return f"<div class=scroll><table class=pictures>{''.join(lines)}</table></div>"


def _inline(image: Tensor) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


def _phase0(figures: list[dict[str, Any]], images: list[tuple[str, Tensor]]) -> str:
    if not figures:
        return ""
    rows = [[row_name(f["route"]), f"{f['psnr_db_mean']:.1f}", f"{f['seconds']:.2f}"] for f in figures]
    return (
        "<h2>Phase 0: the exact full gradient, inverted in closed form</h2>"
        + _pictures(images)
        + _table(["route", "PSNR dB", "seconds"], rows)
    )


def _decoders(report: dict[str, Any]) -> str:
    blocks = []
    for proxy, part in report["proxies"].items():
        kinds = list(next(iter(part["decoders"].values())))
        rows = [
            [layer, *(f"{by_kind[kind]['cosine_mean']:.3f} ({by_kind[kind]['cosine_p05']:.3f})" for kind in kinds)]
            for layer, by_kind in part["decoders"].items()
        ]
        rate = f"{part['pairs']['count']} pairs, {part['pairs']['per_second']:.0f} a second"
        blocks.append(f"<p>Proxy {escape(proxy)}: {escape(rate)}.</p>" + _table(["layer", *kinds], rows))
    return "<h2>Decoders: held-out cosine, mean (5th percentile)</h2>" + "".join(blocks)


def _versions(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    backends = ", ".join(f"{op}: {kernel}" for op, kernel in report["backend"].items())
    return f"<h2>Made with</h2><p>{escape(versions)}</p><p>Kernels: {escape(backends)}</p>"
