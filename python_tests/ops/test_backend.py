"""Which kernels run: the compiled ones where they fit, else the references, with a warning."""

import warnings

import pytest
import torch

from r2f_ext.ops import backend


@pytest.fixture
def built(monkeypatch):
    """Pretend that the installation's build record says something else; the module's state is restored afterwards."""
    monkeypatch.delenv("R2F_FORCE_REFERENCE", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backend, "_build", {})
    monkeypatch.setattr(backend, "_why_not_loaded", None)

    def record(**fields):
        monkeypatch.setattr(backend, "_read_record", lambda: fields)

    return record


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"torch": "1.0.0", "cuda_major": None}, f"compiled for torch 1.0.0, but torch {torch.__version__} is running"),
        ({"torch": torch.__version__, "cuda_major": 3}, "compiled with CUDA 3, but torch runs with CUDA 13"),
    ],
)
def test_a_module_built_for_another_torch_is_not_loaded_and_warns(built, fields, words):
    built(**fields)
    with pytest.warns(RuntimeWarning, match="plain PyTorch operators") as caught:
        backend.load_compiled_kernels()
    assert len(caught) == 1 and words in str(caught[0].message)
    information = backend.build_information()
    assert not information["loaded"] and words in information["why_not_loaded"]


def test_a_module_that_cannot_be_loaded_warns(built, monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol")

    built(torch=torch.__version__, cuda_major=None)
    monkeypatch.setattr(backend.importlib, "import_module", fail)
    with pytest.warns(RuntimeWarning, match="could not be loaded: undefined symbol"):
        backend.load_compiled_kernels()


@pytest.mark.parametrize("forced", [False, True])
def test_plain_operators_by_choice_do_not_warn(built, monkeypatch, forced):
    built(**({"torch": "1.0.0"} if forced else {}))
    if forced:
        monkeypatch.setenv("R2F_FORCE_REFERENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.load_compiled_kernels()
    why = backend.build_information()["why_not_loaded"]
    assert why == "R2F_FORCE_REFERENCE is set" if forced else "no compiled kernels" in why
