"""Words for people: every route and control has one, and numbers agree with their nouns."""

from r2f_ext.audit.controls import Controls
from r2f_ext.audit.names import CONTROLS, counted, layers_in_words, row_name, span
from r2f_ext.inversion.routes import registry
from r2f_ext.types import AdaptedLayer


def test_every_control_has_a_name():
    assert set(Controls.__dataclass_fields__) <= CONTROLS.keys()
    assert row_name("shuffled_adapter") == "control: other adapter"


def test_routes_have_their_title_and_other_keys_stay():
    for name, route in registry().items():
        assert row_name(name) == (route.title or name)
    assert row_name("<b>") == "<b>"


def test_spans_and_counts():
    assert span("rank", [8, 8]) == "rank 8" and span("rank", [16, 8]) == "ranks 8-16"
    assert span("scale", [12.5, 1.0]) == "scales 1-12.5"
    assert counted(1, "adapter") == "1 adapter" and counted(2000, "pair") == "2,000 pairs"


def test_layers_in_words_keep_whole_layers_apart():
    lora, whole = AdaptedLayer("a", 4, 4, 8, 2.0), AdaptedLayer("b", 4, 4, 3072, 1.0, saved=True)
    assert layers_in_words([lora]) == "1 adapted layer, rank 8, scale 2"
    assert layers_in_words([lora, whole]) == "1 adapted layer, rank 8, scale 2, 1 layer saved whole"
    assert layers_in_words([whole, whole]) == "2 layers saved whole"
