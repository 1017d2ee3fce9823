"""What every command does beside its own work: --json."""

from cli_cases import pairs_of, refused


def test_json_that_cannot_be_written(stages, tmp_path, out, capsys):
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, *pairs_of(stages.adapter, out), "--json", tmp_path / "file" / "x.json")
    assert "cannot write" in line
    assert "is a folder" in refused(capsys, *pairs_of(stages.adapter, out), "--json", tmp_path)
    assert not out.exists()
