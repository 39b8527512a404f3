"""The test bed's own promise: in CI no test is skipped for want of the real data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

USES_DATA = "def test_real(data_dir):\n    assert data_dir\n"
OTHER = "import pytest\ndef test_other():\n    pytest.skip('no second host')\n"


@pytest.mark.parametrize(
    ("ci", "text", "code", "closing"),
    [
        ("", USES_DATA, 0, "1 skipped"),
        ("true", USES_DATA, 1, "1 error"),
        ("true", OTHER, 0, "1 skipped"),
    ],
)
def test_a_skip_for_want_of_data_fails_in_ci_alone(tmp_path, ci, text, code, closing):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        env=os.environ | {"CI": ci, "POSTTRAIN_TEST_DATA": str(tmp_path / "none")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, closing in done.stdout) == (code, True), done.stdout + done.stderr


def test_soak_rounds_come_from_the_environment(monkeypatch, request):
    monkeypatch.setenv("POSTTRAIN_SOAK_ROUNDS", "3")
    assert request.getfixturevalue("soak_rounds") == 3
