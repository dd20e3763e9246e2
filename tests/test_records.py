"""experiments.records: finished work that several processes add to."""

import subprocess
import sys

import pytest

from conftest import ROOT
from experiments.records import Records, read
from guard import UserError


def test_two_processes_do_not_erase_each_others_work(tmp_path):
    """The second is refused while the first adds, and then goes on from what the first has left."""
    path = tmp_path / "new" / "r.json"
    other = f"from experiments.records import Records\nwith Records({str(path)!r}) as r: r.add(dict(a=2))"

    def add():
        return subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True, timeout=60)

    late = Records(path)
    with Records(path) as first:
        first.add(dict(a=1))
        assert "in use by process" in add().stderr
        first.add(dict(a=3))
    assert add().returncode == 0
    with late:
        late.add(dict(a=4))
    assert [record["a"] for record in read(path)] == [1, 3, 2, 4]


def test_a_file_that_is_no_list(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="r.json is not a JSON of this command .*choose another --out"):
        Records(tmp_path / "r.json")
