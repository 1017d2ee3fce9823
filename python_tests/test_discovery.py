"""Classes are found where they are defined, and nowhere else."""

import sys

from r2f_ext.discovery import classes_in

FILES = {
    "__init__.py": "",
    "kinds.py": "class Kind: ...",
    "b.py": "from toys.kinds import Kind\nclass Second(Kind): ...\nclass Other: ...",
    "a.py": "from toys.b import Second\nfrom toys.kinds import Kind\nclass First(Kind): ...",
}


def test_subclasses_that_a_module_defines_are_found_once(tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    for name, text in FILES.items():
        (tmp_path / "toys" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        from toys.b import Second

        assert [each.__name__ for each in classes_in("toys", Second)] == ["Second"]
        kind = sys.modules["toys.kinds"].Kind
        assert [each.__name__ for each in classes_in("toys", kind)] == ["First", "Second", "Kind"]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "toys"]:
            del sys.modules[name]
