"""docs/losses.md is what `make docs` writes now, and says of every loss where it comes from."""

from __future__ import annotations

import runpy
from pathlib import Path

from posttrain.advantages import ADVANTAGES
from posttrain.losses import POLICY_LOSSES, VALUE_LOSSES
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
    online = {
        **{f"advantage.type: {name}": cls for name, cls in ADVANTAGES.items()},
        **{f"loss.type: {name}": cls for name, cls in POLICY_LOSSES.items()},
        **{f"critic.loss.type: {name}": cls for name, cls in VALUE_LOSSES.items()},
    }
    for title, cls in online.items():
        section = made.split(f"\n### {title}\n")[1].split("\n### ")[0]
        for setting in cls.model_fields:
            assert f"`{setting}`" in section, f"{title}: {setting} is not told"
        for word in ("Source:", "    "):
            assert word in (cls.__doc__ or ""), f"{title}: no {word!r} in its docstring"
