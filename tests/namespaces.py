"""Whether this machine lets anybody make namespaces, as another program finds it."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def _can_be_made() -> bool:
    if not shutil.which("unshare"):
        return True  # nobody to ask: the tests find out
    asked = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "true"]
    return subprocess.run(asked, capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _can_be_made(), reason="no namespaces can be made here (see docs/rewards.md, Code)"
)
