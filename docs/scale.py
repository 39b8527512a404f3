"""Writes the table of docs/scale.md from docs/scale.json: `make docs`.

    python docs/scale.py                        the page, from the results
    python docs/scale.py 8b/sft/v6e:16x16 ...   these results anew, and the page (all: `all`)

A result is what `posttrain plan ... --search` says of Llama 3's shapes, of which docs/scale has
config.json alone. It takes libtpu (the extra `tpu`) and some minutes each, and no TPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_suffix(".md")
RESULTS = Path(__file__).with_suffix(".json")
GIB = 2**30
MODELS = {"8b": "Llama-3 8B", "70b": "Llama-3 70B"}
JOBS = {
    "sft": ["configs/sft/llama_messages.yaml", "batch.rows=512"],
    "preference": [
        "configs/preference/tulu3_8b_ultrafeedback.yaml",
        *("data.seq_len=4096", "batch.examples=256"),
    ],
}
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")
CASES = [f"{model}/{job}/{one}" for model in MODELS for job in JOBS for one in TOPOLOGIES]
TOKENS = 512 * 4096
"""Of a step: 512 rows, or 256 pairs with a row for each side."""

BEGIN = "<!-- Written by `make docs` from docs/scale.json. -->"
END = "<!-- /Written -->"
COLUMNS = [
    *("model", "job", "slice", "layout", "memory, GiB", "compute, s", "HBM, s"),
    *("interconnect, s", "GB into a device", "binds", "of peak, at most", "tokens/s, at most"),
]


def command(case: str) -> list[str]:
    """The words after `posttrain plan` of a case."""
    model, job, one = case.split("/")
    config, *keys = JOBS[job]
    return [config, f"model.path=docs/scale/llama3_{model}", *keys, "--topology", one, "--search"]


def measure(case: str) -> dict[str, Any]:
    """What the search of a case found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = ["plan", *command(case), "--json", str(out)]
        subprocess.run([sys.executable, "-m", "posttrain.cli", *words], check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def off(mine: float, theirs: float) -> str:
    """How far the analytic model is from a compiled program."""
    return f"{mine / theirs - 1:+.0%}"


def row_of(case: str, found: Mapping[str, Any]) -> list[str]:
    """Cells of COLUMNS: of the layout that won, as it was compiled; the model's error beside."""
    model, job, one = case.split("/")
    best = next(each for each in found["compiled"] if each["layout"] == found["winner"])
    guess, times = best["analytic"], best["floors"]
    names = ("compute", "HBM", "interconnect")
    binds = names[times.index(max(times))]
    share = best["model_flops"] / max(times) / best["peak_flops"]
    wire = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in sorted(best["wire"].items()))
    total = off(sum(guess["wire"].values()), sum(best["wire"].values()))
    seconds = [
        f"{there:.3g} ({off(mine, there)})"
        for mine, there in zip(guess["floors"], times, strict=True)
    ]
    peak = f"{best['peak'] / GIB:.1f} of {found['limit'] / GIB:g}"
    memory = f"{peak} ({off(guess['memory']['total'], best['peak'])})"
    tokens = f"{TOKENS / max(times):,.0f}"
    name = "DPO" if job == "preference" else job.upper()
    cells = [MODELS[model], name, one, best["layout"], memory, *seconds]
    return [*cells, f"{wire} ({total})", binds, f"{share:.0%}", tokens]


def page(text: str, results: Mapping[str, Any]) -> str:
    """The text with its table made anew."""
    rows = [row_of(case, results[case]) for case in CASES if case in results]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def main(cases: Sequence[str]) -> int:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for case in CASES if "all" in cases else cases:
        results[case] = measure(case)
        text = json.dumps({case: results[case] for case in CASES if case in results}, indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
