"""The interface of studies: worlds are hashable, and the registry finds each study once."""

import pytest

from r2f_ext.errors import R2FError
from r2f_ext.studies import CLOTHES, FACES, PHOTOS, Study, World
from r2f_ext.studies.questions import chosen, registry


def test_equal_worlds_share_what_is_cached():
    assert World(quick=True) == World(quick=True) and hash(World()) == hash(World())
    assert World(data=(CLOTHES,)) != World()


def test_data_is_found_by_its_name():
    assert World().named("faces") is FACES and World(data=(PHOTOS,)).named("photos") is PHOTOS


def test_a_study_without_its_parts_cannot_be_made():
    class Unfinished(Study):
        name = "unfinished"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()


def test_a_study_is_chosen_by_name():
    assert [study.name for study in chosen("all")] == sorted(registry())
    assert [study.name for study in chosen("decoder")] == ["decoder"]
    with pytest.raises(R2FError, match="there is no study 'nothing': name one of"):
        chosen("nothing")
