"""The house rules that a reader of one file cannot see: read from the source, nothing is run."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from posttrain import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "posttrain"
MAX_LINES = 350

RANKS = {
    "": 0,  # the root modules
    "chat": 1,
    "models": 1,
    "losses": 1,
    "advantages": 1,
    "data": 2,
    "rewards": 2,
    "tools": 2,
    "tasks": 3,
    "sampling": 4,
    "train": 5,
    "report": 6,
    "doctor": 6,
    "plan": 6,
    "jobs": 7,
    "cli": 8,
}
# folder -> (its dict literals, files that only help the registered ones)
REGISTRIES = {
    "losses": (
        (
            "LOSSES",
            "PAIR_LOSSES",
            "UNPAIRED_LOSSES",
            "REWARD_LOSSES",
            "POLICY_LOSSES",
            "VALUE_LOSSES",
        ),
        {
            *{"base", "pairs", "pair_loss", "unpaired", "mixture"},
            *{"policy_loss", "policy_tokens", "correction", "kl"},
        },
    ),
    "advantages": (("ADVANTAGES",), {"base"}),
    "data/formats": (("FORMATS",), {"base"}),
    "tasks": (("TASKS",), {"base", "files"}),
    "rewards": (
        ("REWARDS",),
        {
            *{"base", "total", "scorer", "answers", "judging", "instructions", "languages"},
            *{"math_pool", "math_worker", "code_trial"},
        },
    ),
    "doctor": (("CHECKS",), {"base"}),
    "tools": (("TOOLS",), {"base"}),
}
NOT_FOR_CONFIG_MODULES = {
    "flax",
    "orbax",
    "grain",
    "pyarrow",
    "tensorstore",
    "transformers",
    "array_record",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
LAUNCH = {module_of(path): path for path in sorted((ROOT / "launch").rglob("*.py"))}
FOLDERS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path, nodes: list[ast.stmt] | None = None) -> list[str]:
    """Dotted names a file imports, from anywhere in it (or among `nodes` alone)."""
    found = []
    walked = ast.walk(tree_of(path)) if nodes is None else nodes
    for node in walked:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.append(whole if whole in SOURCES or whole in LAUNCH else base)
    return found


def house_of(module: str) -> str:
    """The folder of posttrain/ a module stands in; "" for a root module; cli is its own."""
    parts = module.split(".")
    if parts == ["posttrain", "cli"]:
        return "cli"
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and parts[1] in FOLDERS) else ""


def is_upward(importer: str, imported: str) -> bool:
    mine, other = house_of(importer), house_of(imported)
    return mine != other and RANKS[other] >= RANKS[mine]


def test_imports_point_down_only():
    assert set(FOLDERS) <= set(RANKS), "a new folder needs a rank"
    wrong = [
        f"{module} imports {name}"
        for module, path in SOURCES.items()
        for name in imports_of(path)
        if name.split(".")[0] == "launch"
        or (name.split(".")[0] == "posttrain" and is_upward(module, name))
    ]
    assert not wrong


def test_the_rule_about_imports_can_fail():
    assert is_upward("posttrain.models.head", "posttrain.train.loop")
    assert is_upward("posttrain.models.head", "posttrain.losses.nll"), "the same rank"
    assert is_upward("posttrain.optim", "posttrain.models")
    assert is_upward("posttrain.jobs.sft", "posttrain.cli")
    assert not is_upward("posttrain.train.loop", "posttrain.models.head")
    assert not is_upward("posttrain.data.formats.text", "posttrain.data.config")


def test_every_module_is_reached_from_a_command():
    """A file that nothing imports is dead, or a family or job that nobody registered."""
    seen, todo = set(), ["posttrain.cli", *(module for module, _ in cli.JOBS.values())]
    todo += [name for path in LAUNCH.values() for name in imports_of(path)]
    while todo:
        module = todo.pop()
        if module in seen or module not in SOURCES:
            continue
        seen.add(module)
        todo += imports_of(SOURCES[module])
        todo += [module.rpartition(".")[0]]
    assert not sorted(set(SOURCES) - seen)


def test_the_launcher_is_reached_and_stands_on_root_modules():
    """`python -m launch` loads each of its files, and of posttrain no folder before it must, but
    for the table of chips."""
    seen, todo = set(), ["launch.__main__"]
    while todo:
        module = todo.pop()
        if module in LAUNCH and module not in seen:
            seen.add(module)
            todo += [*imports_of(LAUNCH[module]), module.rpartition(".")[0]]
    assert not sorted(set(LAUNCH) - seen)
    tops = {name for path in LAUNCH.values() for name in imports_of(path, tree_of(path).body)}
    folders = {name for name in tops if name in SOURCES and house_of(name) not in ("", "cli")}
    assert folders <= {"posttrain.plan", "posttrain.plan.topology"}
    table = imports_of(SOURCES["posttrain.plan.topology"]) + imports_of(
        SOURCES["posttrain.plan.chips"]
    )
    assert {house_of(name) for name in table if name in SOURCES} <= {"", "plan"}, "it is light"
    assert "posttrain.sharding" not in tops, "it loads jax"


def test_every_backend_of_the_launcher_is_registered():
    modules = {m.rpartition(".")[2] for m, path in LAUNCH.items() if "Backend(" in path.read_text()}
    named = imports_of(LAUNCH["launch"])
    assert modules == {m.rpartition(".")[2] for m in named} - {"base"}


@pytest.mark.parametrize("folder", list(REGISTRIES))
def test_every_file_of_a_registry_is_registered(folder):
    names, helpers = REGISTRIES[folder]
    init = PACKAGE / folder / "__init__.py"
    assigned = {
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target): node.value
        for node in tree_of(init).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
    }
    values = set()
    for name in names:
        literal = assigned[name]
        assert isinstance(literal, ast.Dict), f"{name} must be a dict literal"
        values |= {ast.unparse(value).split(".")[0] for value in literal.values}
    sources = {
        alias.asname or alias.name: node.module.rpartition(".")[2]
        for node in tree_of(init).body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    registered = {sources.get(value, value) for value in values}
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    assert files - helpers == registered


def test_every_job_is_a_command():
    files = {path.stem for path in (PACKAGE / "jobs").glob("*.py")} - {"__init__"}
    assert files == set(cli.JOBS)
    assert all(module == f"posttrain.jobs.{name}" for name, (module, _) in cli.JOBS.items())


def config_fields() -> list[tuple[Path, str, str, int]]:
    """(file, class, field, line) of each field declared by semantic(...) or runtime(...)."""
    return [
        (path, owner.name, node.target.id, node.lineno)
        for path in (SOURCES | LAUNCH).values()
        for owner in ast.walk(tree_of(path))
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) in ("semantic", "runtime")
    ]


def test_every_config_field_is_read():
    """As an attribute somewhere; or by name, in its own file, where that file uses getattr."""
    attributes = {
        node.attr
        for path in (SOURCES | LAUNCH).values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    fields = config_fields()
    assert len(fields) > 40, "the search itself is broken"
    unread = []
    for path, owner, name, line in fields:
        nodes = list(ast.walk(tree_of(path)))
        by_name = any(isinstance(n, ast.Name) and n.id == "getattr" for n in nodes)
        named = any(isinstance(n, ast.Constant) and n.value == name for n in nodes)
        if name != "job" and name not in attributes and not (by_name and named):
            unread.append(f"{path.relative_to(ROOT)}:{line} {owner}.{name}")
    assert not unread


def test_config_modules_are_light():
    for path in {path for path, *_ in config_fields()}:
        heavy = {name.split(".")[0] for name in imports_of(path, tree_of(path).body)}
        assert not heavy & NOT_FOR_CONFIG_MODULES, path


def test_chat_and_data_load_without_jax():
    """The data tools run on machines without accelerators, and in worker processes."""
    for path in [*(PACKAGE / "chat").rglob("*.py"), *(PACKAGE / "data").rglob("*.py")]:
        if path.stem != "world_model":
            names = {name.split(".")[0] for name in imports_of(path, tree_of(path).body)}
            assert not names & {"jax", "jaxlib", "flax", "optax"}, path


def code_files() -> list[Path]:
    return [p for folder in ("posttrain", "launch", "tests") for p in (ROOT / folder).rglob("*.py")]


def test_no_file_is_too_long():
    long = {str(p.relative_to(ROOT)): n for p in code_files() if (n := line_count(p)) > MAX_LINES}
    assert not long


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_nothing_unfinished_or_hidden():
    """Words are joined here from halves, so that this file does not find itself."""
    words = [
        "TO" + "DO",
        "FIX" + "ME",
        "XX" + "X",
        "TYPE_" + "CHECKING",
        "NotImplemented" + "Error",
    ]
    marks = ["/wo" + "rk/", "index-" + "url", "extra-" + "index", "/simp" + "le/", "pypi" + ".org"]
    pattern = re.compile(r"\b(?:" + "|".join(words) + r")\b|" + "|".join(map(re.escape, marks)))
    texts = [p for f in ("configs", "docs", "launch") for p in (ROOT / f).rglob("*.*")]
    tops = ["Makefile", ".ci/run", "README.md", "CONTRIBUTING.md", "constraints.txt"]
    texts += [*code_files(), *(ROOT / name for name in tops)]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        if path.suffix != ".pyc"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong
    names = {p.stem for p in code_files()}
    assert not {n for n in names if n == "utils" or n.endswith("_v2") or n == "experimental"}


def test_every_module_is_named_by_a_test():
    words = set()
    for path in (ROOT / "tests").rglob("*.py"):
        words |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    modules = {path.stem for path in (SOURCES | LAUNCH).values()} - {"__init__"}
    assert not sorted(modules - words)
