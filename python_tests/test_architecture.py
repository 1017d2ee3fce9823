"""The dependency rule of docs/architecture.md: a module of the package imports only from layers below its own."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import r2f_ext

PACKAGE = Path(r2f_ext.__file__).parent
LAYERS = (
    ("errors", "discovery", "onednn"),
    (
        "types",
        "files",
        "json_file",
        "linalg",
        "malloc",
        "progress",
        "distributed",
        "forked",
        "gpu",
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


def needed(path, names):
    """Those of the modules `names` that a file imports at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            source = ".".join((*above, node.module) if node.module else above)
            for alias in node.names:  # a module of the package `source`, or else something that `source` defines
                yield from [name for name in (f"{source}.{alias.name}", source) if name in names][:1]


@pytest.mark.parametrize("package", sorted({path.parts[0] for path in PACKAGES}))
def test_modules_of_a_package_import_one_another_without_a_cycle(package):
    files = {path.relative_to(PACKAGE.parent).with_suffix("").parts: path for path in (PACKAGE / package).rglob("*.py")}
    named = {".".join(parts).removesuffix(".__init__"): path for parts, path in files.items()}
    TopologicalSorter({name: set(needed(path, named)) for name, path in named.items()}).prepare()


@pytest.mark.parametrize("path", MODULES + PACKAGES, ids=str)
def test_only_optional_packages_are_imported_inside_functions(path):
    tree = ast.parse((PACKAGE / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {name for function in functions for name in imported(function)} <= OPTIONAL
