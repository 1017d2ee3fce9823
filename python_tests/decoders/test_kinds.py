"""Which decoders can be chosen, and which are fitted where none is."""

import inspect

from r2f_ext.decoders import KINDS
from r2f_ext.decoders.base import Decoder
from r2f_ext.decoders.kinds import DEFAULT_KINDS
from r2f_ext.decoders.learned import Learned


def subclasses(of):
    for each in of.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_decoder_of_the_package_can_be_chosen_by_its_own_name():
    concrete = {
        each
        for each in subclasses(Decoder)
        if not inspect.isabstract(each) and each.__module__.startswith("r2f_ext.decoders.")
    }
    assert set(KINDS.values()) == concrete
    assert all(name == kind.kind for name, kind in KINDS.items())


def test_what_is_fitted_by_default_has_a_closed_form():
    assert not any(issubclass(KINDS[kind], Learned) for kind in DEFAULT_KINDS)
