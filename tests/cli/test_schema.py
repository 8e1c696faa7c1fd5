from __future__ import annotations

import json


def test_the_schema_is_printed_as_it_ships(safeloop):
    done = safeloop("schema")
    assert (done.exit_code, done.stderr) == (0, "")
    assert {"run", "model", "optimizers", "losses"} <= json.loads(done.stdout)["properties"].keys()


def test_the_schema_goes_to_a_file(tmp_path, safeloop):
    file = tmp_path / "schema.json"
    done = safeloop("schema", "--output", str(file))
    assert done.exit_code == 0
    assert json.loads(file.read_text()) == json.loads(safeloop("schema").stdout)


def test_a_file_that_cannot_be_written_exits_6(tmp_path, safeloop):
    done = safeloop("schema", "--output", str(tmp_path))
    assert (done.exit_code, done.stdout) == (6, "")
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
