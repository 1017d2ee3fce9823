"""The documents: links lead somewhere, lines are short, cited sections and recorded results exist."""

import ast
import re
from pathlib import Path

import pytest

import r2f_ext

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for pattern in ("*.md", "docs/**/*.md", "csrc/*.md", "benchmarks/**/*.md") for p in ROOT.glob(pattern))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CITED = re.compile(r"docs/methods(?:\.md)?, (?:section )?(\d[a-g]?)")

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="no documents beside these tests")


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page if not name else page.parent / name
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page):
    """Rows of tables cannot be wrapped."""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    assert [number for number, line in lines if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_recorded_results_and_scripts_exist(page):
    named = re.findall(
        r"`((?:benchmarks|examples|docs|r2f_ext|csrc|python_tests)/[\w./-]+\.\w+)`", page.read_text("utf-8")
    )
    made = {"r2f_ext/_build_info.json"}  # by the build
    assert [name for name in named if name not in made and not (ROOT / name).exists()] == []


def test_cited_sections_exist():
    sections = set(
        re.findall(r"^#+ (\d[a-g]?)\. ", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {"1", "2", "3", "3a", "3f", "8"} <= sections
    for folder in ("r2f_ext", "csrc", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".md"):
                text = " ".join(path.read_text(encoding="utf-8").split())
                assert "METHODS" not in text, path
                assert set(CITED.findall(text)) <= sections, path


def test_the_readmes_example_imports_from_the_front_door_alone():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    imports = [node for node in ast.walk(ast.parse(example)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {node.module for node in imports} == {"r2f_ext"}
    assert {alias.name for node in imports for alias in node.names} <= set(r2f_ext.__all__)
