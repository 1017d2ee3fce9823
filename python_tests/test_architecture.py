"""The dependency rule of docs/architecture.md: a module of the package imports only from layers below its own."""

import ast
from pathlib import Path

import pytest

import r2f_ext

PACKAGE = Path(r2f_ext.__file__).parent
LAYERS = (
    ("errors", "discovery"),
    (
        "types",
        "files",
        "json_file",
        "linalg",
        "malloc",
        "progress",
        "distributed",
        "cuda_graph",
        "graph_optimizer",
        "ops",
    ),
    ("env", "kernel_solver"),
    ("models", "data"),
    ("capture",),
    ("pairs",),
    ("decoders",),
    ("inversion",),
    ("config",),
    ("audit",),
    ("studies",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OPTIONAL = {"diffusers", "torch.utils.tensorboard"}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
PACKAGES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def imported(tree):
    """Dotted names that the statements below `tree` import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            whole = node.module == "r2f_ext"
            yield from (f"r2f_ext.{alias.name}" for alias in node.names) if whole else [node.module]


@pytest.mark.parametrize("path", MODULES + PACKAGES, ids=str)
def test_imports_point_down(path):
    own = path.parts[0].removesuffix(".py")
    tree = ast.parse((PACKAGE / path).read_text())
    used = {name.split(".")[1] for name in imported(tree) if name.startswith("r2f_ext.")} - {own, "__version__"}
    assert own in LEVEL and used <= LEVEL.keys(), "give the new module a layer"
    assert {name for name in used if LEVEL[name] >= LEVEL[own]} == set()


@pytest.mark.parametrize("path", MODULES + PACKAGES, ids=str)
def test_only_optional_packages_are_imported_inside_functions(path):
    tree = ast.parse((PACKAGE / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {name for function in functions for name in imported(function)} <= OPTIONAL
