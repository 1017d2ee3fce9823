"""What must be beside the modules of an installed package; `make wheel-test` runs this on a built wheel."""

import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import r2f_ext
from r2f_ext.data import load_images
from r2f_ext.models import load_base
from r2f_ext.ops import build_information

PACKAGE = Path(r2f_ext.__file__).parent
SOURCE = Path(__file__).parents[1]


def test_data_files_are_installed():
    assert (PACKAGE / "py.typed").is_file()
    assert load_base("embedded").num_classes == 10
    assert len(load_images("embedded", role="private")) == 100


def test_every_asset_has_a_suffix_that_is_packaged():
    patterns = tomllib.loads((SOURCE / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    assets = [path for path in PACKAGE.rglob("assets/*") if path.is_file()]
    assert len(assets) >= 3
    assert [path.name for path in assets if f"assets/*{path.suffix}" not in patterns] == []


def test_the_build_record_lies_beside_compiled_kernels():
    if not build_information()["loaded"]:
        pytest.skip("no compiled kernels")
    assert json.loads((PACKAGE / "_build_info.json").read_text())["torch"]


def test_metadata_agrees_with_the_package():
    assert metadata.version("r2f-ext") == r2f_ext.__version__
    assert any(point.name == "r2f" for point in metadata.entry_points(group="console_scripts"))
