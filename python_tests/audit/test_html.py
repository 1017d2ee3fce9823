"""report.html says the verdict first, loads nothing, escapes whatever is in it, and reads well on any screen."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from page_cases import EXACT, LAYERS, closed_forms, report, victims
from PIL import Image

from r2f_ext.audit import html as module
from r2f_ext.audit.html import write_html
from r2f_ext.audit.schema import NotTried
from r2f_ext.models import AdapterFacts

EVIL = "<script>alert(1)</script>' onerror=\"x"
FILES = {"report.html": "this page", "gradients.safetensors": "the decoded gradients"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """Tags, texts by tag, and a check that every tag is closed where it should be."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text, self.headings, self.links = [], [], "", [], []
        self.images, self.attributes, self.scopes = [], set(), []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.attributes |= named.keys()
        if tag == "img":
            self.images.append(named)
        if tag == "a":
            self.links.append(named["href"])
        if tag == "th":
            self.scopes.append(named.get("scope"))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings.append((int(self.open[-1][1]), data))


def page_of(path, sets, phase0=(), figures=None):
    """(its text, what is read from it)."""
    write_html(path, figures or report(sets, phase0), [part for part, _ in sets], phase0, FILES)
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return text, reader


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """name -> (text, reader) of reports of one victim, of two, of many in two sets, and without private images."""
    folder, many = tmp_path_factory.mktemp("pages"), victims(11, name="clothes")
    cases = {
        "one": ([victims(1)], []),
        "two": ([victims(2, shape=(3, 48, 64))], []),
        "many": ([many, victims(4, name="faces", exact=False)], closed_forms(many[0])),
        "unscored": ([victims(1, private=False)], []),
    }
    return {name: page_of(folder / f"{name}.html", *case) for name, case in cases.items()}


@pytest.mark.parametrize("name", ["one", "two", "many", "unscored"])
def test_it_loads_nothing_and_is_in_order(pages, name):
    text, reader = pages[name]
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(reader.tags)
    assert not re.search(r"(src|href)\s*=\s*['\"]?(https?:|//)", text) and "@import" not in text and "url(" not in text
    assert reader.images and all(image["src"].startswith("data:image/png;base64,") for image in reader.images)
    assert all(image["alt"] for image in reader.images) and all(reader.scopes)
    assert 'name="viewport"' in text and "None" not in reader.text and "nan" not in reader.text
    levels = [level for level, _ in reader.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))


def test_everything_from_outside_is_escaped(tmp_path):
    part, figures = victims(2, name=EVIL)
    routes = {
        route: replace(values, why=EVIL, exact=values.exact and [replace(EXACT, words=EVIL)] * 2)
        for route, values in figures.routes.items()
    }
    figures = replace(figures, routes=routes, proxy=EVIL, pairing=EVIL, notes=[EVIL], verdict=EVIL, judged_route=EVIL)
    whole = report([(part, figures)], adapters=[AdapterFacts(EVIL, (EVIL,), (EVIL,), init=EVIL)] * 2)
    proxy = whole.proxies["procedural"]
    whole = replace(
        whole,
        verdict=replace(
            whole.verdict,
            sentences=[EVIL, EVIL],
            tried=[EVIL],
            not_tried=[NotTried(EVIL, EVIL)],
            threat_model={"amortised": EVIL},
        ),
        target=replace(whole.target, base=EVIL, identifiable={EVIL: True}, why={EVIL: EVIL}),
        proxies={EVIL: replace(proxy, decoders={EVIL: proxy.decoders[LAYERS[0]]})},
        spectra={EVIL: whole.spectra[LAYERS[0]]},
        inputs=replace(whole.inputs, adapters=(EVIL,), base=EVIL),
        notes=[EVIL],
        command=EVIL,
        date=EVIL,
        device=EVIL,
    )
    text, reader = page_of(tmp_path / "r.html", [(part, figures)], figures=whole)
    assert "<script" not in text and not {name for name in reader.attributes if name.startswith("on")}
    assert reader.text.count(EVIL) >= 35
    assert all(EVIL in image["alt"] for image in reader.images)


def test_the_verdict_comes_first_and_exactness_before_all(pages):
    _, reader = pages["one"]
    assert [text for _, text in reader.headings][1] == "Recovered exactly"
    before = reader.text[: reader.text.index("Pictures")]
    for words in ("to 78 dB", "+1.3 dB", "95 % interval +0.4 to +2.2 dB", "no proof of safety", "higher is closer"):
        assert words in before
    assert "mean image of the proxy has 9.1 dB" in re.sub(r"\s+", " ", before)
    assert "Tried:" not in before and "Not tried:" not in before
    assert "this adapter" in reader.text and "these adapters" not in reader.text and "1 adapters" not in reader.text
    many = pages["many"][1].text
    assert "this adapter" not in many and "these adapters" in many and "What 15 adapters give away" in many


@pytest.mark.parametrize(("leak", "heading"), [(True, "Leak"), (False, "No leak shown"), (None, "Not judged")], ids=str)
def test_without_an_exact_image_the_heading_is_the_leak(tmp_path, leak, heading):
    sets = [victims(1, private=leak is not None, exact=False)]
    whole = report(sets)
    verdict = replace(whole.verdict, leak=leak)
    if leak is None:
        verdict = replace(verdict, beyond_control_db=None, interval_db=None)
    _, reader = page_of(tmp_path / "r.html", sets, figures=replace(whole, verdict=verdict))
    assert reader.headings[1] == (2, heading) and "no proof of safety" in reader.text
    assert "safe" not in reader.text.replace("proof of safety", "").replace("safetensors", "")


def test_an_exact_image_without_private_images_is_said_and_not_called_unscored(pages):
    _, reader = pages["unscored"]
    assert reader.headings[1][1] == "Recovered exactly" and "✓ exact to 78 dB" in reader.text
    assert "not scored" not in reader.text and "no picture has a PSNR" in reader.text and "Controls:" not in reader.text


def test_pictures_keep_their_shape_and_carry_their_figures(pages):
    _, reader = pages["two"]
    assert len(reader.images) == 2 * (1 + 2 + 6)  # originals, routes, controls
    for image in reader.images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as read:
            assert read.size == (64, 48) == (int(image["width"]), int(image["height"]))
    assert {image["alt"].split(", ")[1] for image in reader.images} == {"adapter-0", "adapter-1"}
    assert sum("✓ exact to 78 dB" in image["alt"] for image in reader.images) == 2
    assert "control: other adapter" in reader.text
    _, many = pages["many"]
    assert len(many.images) == 11 * (1 + 2 + 6 + 1) + 4 * (1 + 1 + 6)
    assert "7 of 11" not in many.text and "exact to 78 dB: 8 of 11 (victim 1, victim 2, victim 4" in many.text


def test_many_victims_are_cut_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_VICTIMS", 6)
    _, reader = page_of(tmp_path / "r.html", [victims(7)])
    assert "The first 6 of 7 victims" in reader.text and len(reader.images) == 6 * 9


def test_routes_say_why_who_and_which_labels(pages):
    text = pages["two"][1].text
    for words in (
        "Why gauss_newton.",
        "Anyone who has the adapter and the public base.",
        "0, 1; true: 0, 1 (50 % right)",
    ):
        assert words in text
    for words in ("route minus control", "+1.3 dB", "+0.4 to +2.2 dB", "0.005", "simulated 199 times", "+3.2 dB"):
        assert words in text


def test_layers_are_plotted_with_what_they_are_compared_with(pages):
    text, reader = pages["one"]
    assert reader.tags.count("svg") == 5 + 8 + 8  # legend, cosines, spectra
    for words in ("estimate for the audited data", "class-mean gradient", "projection, no training", "0.760", "0.650"):
        assert words in reader.text
    assert text.count('class="bar"') == 8 * 8 and "6 of 8" in reader.text
    assert 'cx="93.00%"' in text


def test_marks_of_figures_that_are_missing_are_left_out(tmp_path):
    sets = [victims(1)]
    whole = report(sets)
    for kinds in whole.proxies["procedural"].decoders.values():
        for kind, figures in kinds.items():
            kinds[kind] = replace(figures, victim_true=None, class_mean_cosine=-0.2, floor_cosine=None)
    text, reader = page_of(tmp_path / "r.html", sets, figures=whole)
    assert "on the private images" not in reader.text and "floor" not in reader.text and "-0.200" in reader.text
    assert 'x1="0.00%"' in text and "-20" not in text


def test_how_it_was_made_and_what_was_not_tried(pages):
    _, reader = pages["one"]
    for words in (
        "2026-01-02 03:04 UTC",
        "../my-adapter",
        "r2f audit my-adapter --out report",
        "r2f audit --replay report.json",
        "optimizer.pt lies beside it.",
        "Keys lost a prefix.",
        "It was not asked for.",
        "ranks 8-16",
        "scale 2;",
        "torch 2.9",
    ):
        assert words in reader.text
    assert reader.links == list(FILES)
    order = [reader.text.index(words) for words in ("Means tried", "Equations against unknowns", "No gradient is obs")]
    assert order == sorted(order) and reader.headings[-1][1] == "Equations against unknowns"


def test_adapters_of_which_the_same_is_said_share_an_entry(tmp_path):
    def facts(i):
        return AdapterFacts(f"a{i}", leaks=("Rare.",) * (i == 1), dropout=0.1 * (i == 2))

    sets = [victims(4)]
    _, reader = page_of(tmp_path / "r.html", sets, figures=report(sets, adapters=[facts(i) for i in range(4)]))
    folders = [text for level, text in reader.headings if level == 3 and text.startswith("a")]
    assert folders == ["a0, a3", "a1", "a2"] and "lora_dropout 0.1" in reader.text
    first = reader.text[: reader.text.index("Pictures")]
    assert "1 of 4 folders also give something away" in first and reader.text.count("Rare.") == 1


def test_what_the_folder_gives_away_stands_beside_the_verdict(tmp_path, pages):
    """A reader who stops at the first box knows of the label in a saved head; it is said once."""
    for name, who in (("one", "The folder also gives away"), ("two", "The folders also give away")):
        _, reader = pages[name]
        first = reader.text[: reader.text.index("Pictures")]
        assert who in first and "optimizer.pt lies beside it." in first
        assert reader.text.count("optimizer.pt lies beside it.") == 1
    sets = [victims(1, private=False, exact=False)]
    _, reader = page_of(tmp_path / "r.html", sets, figures=report(sets, adapters=[AdapterFacts("a")]))
    assert (
        "also give" not in reader.text and "none" in reader.text and "no route that could show one ran" in reader.text
    )
    assert "no route that could show one ran" not in pages["one"][1].text


WRAPPER = """<!doctype html><body>
<iframe style="width:%dpx;height:900px;border:0;display:block" srcdoc="%s"></iframe><pre></pre>
<script>
const lum = c => c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const rgb = text => text.match(/[\\d.]+/g).map(Number);
onload = () => {
  const page = document.querySelector("iframe").contentDocument, view = page.defaultView, worst = [21, ""];
  const back = node => { const c = rgb(view.getComputedStyle(node).backgroundColor);
    return c.length < 4 || c[3] > 0 ? c : back(node.parentElement); };
  for (const node of page.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some(child => child.nodeType == 3 && child.data.trim());
    if (!own || node.closest("svg")) continue;
    const pair = [rgb(view.getComputedStyle(node).color), back(node)];
    const [a, b] = pair.map(c => lum(c.slice(0, 3))).sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst[0]) { worst[0] = ratio; worst[1] = node.outerHTML.slice(0, 80); }
  }
  const shape = i => i.clientWidth / i.clientHeight * i.naturalHeight / i.naturalWidth;
  const images = [...page.images].map(i => [i.clientWidth, shape(i)]);
  const captions = [...page.querySelectorAll("caption")].map(caption => caption.clientWidth);
  const why = [...page.querySelectorAll("td[data-name=why]")].map(td => td.getBoundingClientRect());
  document.querySelector("pre").textContent = JSON.stringify({
    overflow: page.documentElement.scrollWidth - view.innerWidth, contrast: worst, images, captions,
    why: why.every(box => box.width > 100 && box.left >= 0 && box.right <= view.innerWidth),
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches});
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("name", "width", "dark"), [("one", 390, True), ("many", 390, False), ("one", 1280, False)])
def test_in_a_browser(pages, tmp_path, name, width, dark):
    """Nothing overflows, pictures are large and not squashed, contrast is AA (4.5), in light and dark."""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(WRAPPER % (width, html.escape(pages[name][0])), encoding="utf-8")
    quiet = "no-first-run disable-background-networking disable-component-update disable-sync disable-quic disable-gpu"
    options = [f"--{word}" for word in ("headless", "no-sandbox", "hide-scrollbars", *quiet.split())]
    done = subprocess.run(
        [
            CHROMIUM,
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={max(width, 500)},1000",
            f"--screenshot={tmp_path / 'page.png'}",
            f"--print-to-pdf={tmp_path / 'page.pdf'}",
            "--dump-dom",
            wrapper.as_uri(),
        ],
        capture_output=True,
        timeout=120,
    )
    seen = json.loads(re.search(r"<pre>(\{.*?\})</pre>", html.unescape(done.stdout.decode()), re.S)[1])
    assert seen["dark"] is dark and seen["overflow"] <= 0 and seen["why"]
    assert seen["contrast"][0] >= 4.5, seen["contrast"]
    assert min(seen["captions"]) > 150
    least = 128 if name == "one" else 80
    assert seen["images"] and all(wide >= least and 0.97 < shape < 1.03 for wide, shape in seen["images"])
    with Image.open(tmp_path / "page.png") as screenshot:
        shades = np.asarray(screenshot.convert("L").crop((0, 0, width, 900)))
    assert bool(np.median(shades) < 100) is dark and shades.std() > 10
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
