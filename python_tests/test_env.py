"""What an installation says of itself."""

import json
import platform
from importlib import metadata

import torch

from r2f_ext import __version__, env
from r2f_ext.env import environment


def test_versions_are_those_installed():
    versions = environment()["versions"]
    assert versions["r2f_ext"] == __version__ and versions["torch"] == torch.__version__
    assert versions["python"] == platform.python_version()
    for package in ("timm", "peft", "numpy", "torchvision"):
        assert versions[package] == metadata.version(package)


def test_it_is_plain_data_with_every_operator():
    information = json.loads(json.dumps(environment()))
    assert set(information["backends"]) == set(env.SCHEMAS)
    for backends in information["backends"].values():
        assert backends["cpu"] in ("cpu", "reference") and set(backends) == {"cpu", "cuda"}
    assert (information["cuda_device"] is None) is not torch.cuda.is_available()


def test_an_absent_package_is_none(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package",))
    assert environment()["versions"]["no-such-package"] is None
