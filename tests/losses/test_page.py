"""docs/losses.md is what `make docs` writes now, and says of every loss where it comes from."""

from __future__ import annotations

import runpy
from pathlib import Path

from posttrain.losses.mixture import PREFERENCE_LOSSES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_losses_is_current() -> None:
    page = (DOCS / "losses.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(DOCS / "losses.py"))["page"](page)
    assert page == made, "run `make docs`"
    for name, cls in PREFERENCE_LOSSES.items():
        assert f"\n## {name}\n" in made
        section = made.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for setting in cls.model_fields:
            assert f"`{setting}`" in section, f"{name}: {setting} is not told"
        for word in ("Source:", "When:", "    "):
            assert word in (cls.__doc__ or ""), f"{name}: no {word!r} in its docstring"
