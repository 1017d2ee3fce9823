import pytest

from r2f_ext.errors import R2FError
from r2f_ext.studies import FACES, Row, Table, World
from r2f_ext.studies.questions.defence import DEFENCES, DefenceStudy, public_of


def rows(level, strength, recovered, accuracy):
    keys = {"defence": "rank", "level": level, "strength": strength}
    return [
        Row({**keys, "route": "amortised"}, "recovered", tuple(recovered), min(recovered), max(recovered)),
        Row(keys, "accuracy", tuple(accuracy), min(accuracy), max(accuracy)),
    ]


@pytest.mark.parametrize("helps", [True, False])
def test_conclusions_follow_the_table(helps):
    leak = [0.1, 0.2] if helps else [0.8, 0.9]
    table = Table([*rows(0, "none", [0.7, 0.9], [0.6, 0.7]), *rows(1, "rank 4", leak, [0.4, 0.5])])
    (said,) = DefenceStudy().conclude(World(), table)
    assert f"Clearly fewer images than undefended: {'rank 4' if helps else 'nowhere'};" in said
    assert said.endswith("clearly less accuracy: rank 4.")


def test_conclusions_of_tables_with_holes():
    assert DefenceStudy().conclude(World(), Table([])) == []
    assert DefenceStudy().conclude(World(), Table(rows(0, "none", [0.5, 0.6], [0.5, 0.6]))) == []
    assert DefenceStudy().conclude(World(), Table(rows(1, "rank 4", [0.5, 0.6], [0.5, 0.6]))) == []


def test_every_curve_starts_undefended():
    settings = DefenceStudy().settings(World())
    assert {each["defence"] for each in settings if each["strength"] == "none"} == set(DEFENCES)
    assert all((each["level"] == 0) == (each["strength"] == "none") for each in settings)
    assert len(DefenceStudy().settings(World(quick=True))) >= 2


def test_images_without_labels_have_no_accuracy():
    with pytest.raises(R2FError, match="random"):
        public_of(World(data=(FACES,), quick=True), 0)
