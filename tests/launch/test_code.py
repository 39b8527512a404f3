"""launch/code.py: which files travel, and that nothing uncommitted does in silence."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from launch import code
from posttrain import config
from posttrain.config import ConfigError
from tests.launch.fakes import git, make_checkout


def files(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        return {m.name: f.read() for m in tar if (f := tar.extractfile(m)) is not None}


@pytest.fixture
def root(tmp_path) -> Path:
    return make_checkout(tmp_path / "checkout")


def test_a_commit_travels_with_its_name(root):
    found = code.read(root, [], allow_dirty=False)
    assert found.revision == git(root, "rev-parse", "HEAD").strip()
    body = files(found.archive)
    assert {*body} == {
        *("posttrain/__init__.py", "posttrain/cli.py", "pyproject.toml", "constraints.txt"),
        "posttrain/REVISION",
    }
    assert body["posttrain/REVISION"].decode() == found.revision + "\n"
    assert "mine/losses.py" in files(code.read(root, ["mine"], allow_dirty=False).archive)


def test_the_same_files_are_the_same_bytes(root, tmp_path):
    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(root), str(again))
    (again / "posttrain" / "cli.py").touch()
    first, second = (code.read(r, [], allow_dirty=False).archive for r in (root, again))
    assert first == second
    assert first[4:8] == bytes(4), "the time it was made"


def test_changes_are_refused_by_name_or_travel(root):
    (root / "posttrain" / "cli.py").write_text("print('changed')\n")
    (root / "posttrain" / "new.py").write_text("x = 2\n")
    (root / "constraints.txt").unlink()
    (root / "mine" / "losses.py").write_text("not part of what travels")
    with pytest.raises(
        ConfigError, match=r"constraints\.txt, posttrain/cli\.py, posttrain/new\.py"
    ):
        code.read(root, [], allow_dirty=False)
    found = code.read(root, [], allow_dirty=True)
    body = files(found.archive)
    assert found.changed == ("constraints.txt", "posttrain/cli.py", "posttrain/new.py")
    assert body["posttrain/cli.py"] == b"print('changed')\n"
    assert body["posttrain/new.py"] == b"x = 2\n"
    assert "constraints.txt" not in body
    assert body["posttrain/REVISION"].decode() == found.revision + "-dirty\n"
    assert b"+print('changed')" in body["uncommitted.patch"]


def test_what_is_no_checkout_or_no_path_of_it_is_told(root, tmp_path):
    with pytest.raises(ConfigError, match="is no git checkout"):
        code.read(tmp_path, [], allow_dirty=False)
    for path in ("../checkout2", "nowhere", "/etc"):
        with pytest.raises(ConfigError, match="is no path inside"):
            code.read(root, [path], allow_dirty=False)


def test_the_name_of_the_code_is_known_where_there_is_no_git(tmp_path, monkeypatch):
    (tmp_path / "REVISION").write_text("abc-dirty\n")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    assert config.versions()["git"] == "abc-dirty"
