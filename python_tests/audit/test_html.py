"""report.html loads nothing from anywhere and escapes whatever is in it."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from r2f_ext.audit.html import write_html
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.report import AuditReport
from r2f_ext.audit.sets import set_report
from r2f_ext.inversion.identifiability import identifiability

EVIL = "<script>alert(1)</script>' onerror=\"x"


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.attributes, self.text, self.open = [], [], set(), "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(audited, tmp_path_factory):
    target = replace(audited.target, base=replace(audited.target.base, spec=EVIL))
    part = replace(set_report(EVIL, audited.result, audited.proxy, audited.private), proxy=EVIL, notes=(EVIL,))
    verdicts = identifiability(audited.target.base, adapter=audited.target, steps=1)
    verdicts["matching"] = replace(verdicts["matching"], why=EVIL)
    result = replace(audited.result, decoders={EVIL: next(iter(audited.result.decoders.values()))})
    phase0 = [Phase0Report(EVIL, 100.0, 90.0, 0.1, EVIL, part.originals)]
    config = audited.config
    report = AuditReport(target, verdicts, {EVIL: result}, [part], config, {}, notes=(EVIL,), phase0=phase0).to_json()
    path = tmp_path_factory.mktemp("html") / "report.html"
    write_html(path, report, [part], phase0)
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    return text, reader, report


def test_it_loads_nothing(page):
    text, reader, _ = page
    assert "script" not in reader.tags and "link" not in reader.tags and "iframe" not in reader.tags
    assert reader.sources and all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not re.search(r"(src|href)\s*=\s*['\"]?https?:", text) and "@import" not in text and "url(" not in text


def test_everything_is_escaped(page):
    text, reader, _ = page
    assert "<script" not in text and not {name for name in reader.attributes if name.startswith("on")}
    # Base, its note, a verdict's reason, set, proxy, the set's note, phase 0 (pictures and table), proxy, layer.
    assert reader.text.count(EVIL) == 10
    assert reader.open == []


def test_every_image_is_there(page, audited):
    _, reader, _ = page
    assert len(reader.sources) == 3 * (1 + 3 + 4 + 1)  # originals, routes, controls, phase 0
    image = Image.open(io.BytesIO(base64.b64decode(reader.sources[0].split(",")[1])))
    assert image.size == (64, 64)


def test_the_figures_are_on_the_page(page):
    _, reader, report = page
    figures = report["reconstruction"][EVIL]
    assert figures["verdict"] in reader.text
    for route in figures["routes"].values():
        assert f"{route['psnr_db_mean']:.2f}" in reader.text
    for value in figures["controls"].values():
        assert f"{value:.2f}" in reader.text


def test_an_unscored_report_still_has_a_page(audited, tmp_path):
    part = set_report("x", audited.result, audited.proxy, None)
    verdicts = identifiability(audited.target.base, adapter=audited.target)
    report = AuditReport(audited.target, verdicts, {"p": audited.result}, [part], audited.config, {}).to_json()
    write_html(tmp_path / "report.html", report, [part], [])
    text = (tmp_path / "report.html").read_text()
    assert text.count("not scored") == 3 and "Phase 0" not in text and "None" not in text
