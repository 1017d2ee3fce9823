"""One sentence for a file that cannot be read, and one for a file that holds no JSON."""

import pytest

from r2f_ext.errors import R2FError
from r2f_ext.json_file import read_json_file


def test_the_value_of_a_file(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "Überzug"}', encoding="utf-8")
    assert read_json_file(tmp_path / "a.json", "damaged", "write it again") == {"name": "Überzug"}


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_said_with_the_remedy(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(R2FError) as caught:
        read_json_file(path, "damaged", "write it again")
    assert str(caught.value) == f"'{path}' is damaged: write it again."


def test_what_cannot_be_read_is_said_with_the_cause(tmp_path):
    with pytest.raises(R2FError, match=r"cannot be read \(No such file or directory\): write it again\.$"):
        read_json_file(tmp_path / "a.json", "damaged", "write it again")
