"""Every study of the registry, run as `r2f study NAME --quick` runs it."""

import math

import pytest

from r2f_ext.cli.options import STUDIES
from r2f_ext.errors import R2FError
from r2f_ext.studies import World, run_study
from r2f_ext.studies.questions import chosen, registry


def test_the_registry_holds_the_studies_that_the_command_line_names():
    assert tuple(registry()) == STUDIES
    assert [study.name for study in chosen("all")] == list(STUDIES)
    assert [study.name for study in chosen("rank")] == ["rank"]
    with pytest.raises(R2FError, match="there is no study 'none'"):
        chosen("none")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_whole_sentences_and_settings_that_differ(name):
    study = registry()[name]
    assert study.question.endswith("?")
    assert study.method.endswith(".") and (study.no_controls == "" or study.no_controls.endswith("."))
    assert study.panels
    for world in (World(), World(quick=True)):
        settings = [tuple(setting.items()) for setting in study.settings(world)]
        assert len(set(settings)) == len(settings) >= 2
    assert len(study.settings(World(quick=True))) <= len(study.settings(World()))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_quick_run_writes_finite_figures_a_drawing_and_sentences(name, tmp_path):
    result = run_study(registry()[name], World(quick=True), tmp_path)
    assert result.failed == {}
    assert all(math.isfinite(value) for row in result.table for value in row.values)
    assert {path.name for path in result.folder.iterdir()} == {"record.json", "table.csv", "figure.png", "page.md"}
    sentences = result.sentences()
    assert len(sentences) >= 2 and all(one.endswith((".", ".)")) for one in sentences)
