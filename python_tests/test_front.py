"""The front door: `import r2f_ext` is light, and every public name is what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import r2f_ext

PACKAGE = Path(r2f_ext.__file__).parent
HEAVY = {"torch", "numpy", "scipy", "timm", "peft", "torchvision", "skimage", "matplotlib", "rich"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a new process has loaded after running `code`."""
    code += "; import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout
    return set(json.loads(printed))


@pytest.mark.parametrize(
    "code",
    [
        "import r2f_ext",
        "import r2f_ext; dir(r2f_ext)",
        "from r2f_ext import R2FError",
        "import r2f_ext.cli.options",  # for a quick --help
    ],
)
def test_importing_loads_nothing_heavy(code):
    assert not HEAVY & modules_after(code)


def test_every_public_name_exists():
    assert set(r2f_ext.__all__) <= set(dir(r2f_ext))
    assert set(r2f_ext._NAMES) == set(r2f_ext.__all__) - {"__version__", "audit"}
    for name in r2f_ext.__all__:
        assert getattr(r2f_ext, name) is not None


@pytest.mark.parametrize("before", ["", "import r2f_ext.audit.metrics; "])
def test_a_name_loads_what_it_needs_and_audit_is_callable_whatever_was_imported_before(before):
    code = f"{before}from r2f_ext import audit; assert callable(audit) and audit.audit"
    assert "torch" in modules_after(code)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        r2f_ext.nothing  # noqa: B018


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
