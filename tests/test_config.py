"""config.py, config_yaml.py, config_errors.py, config_fields.py and config_help.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from posttrain import config_errors, config_fields
from posttrain.config import (
    Config,
    ConfigError,
    diff,
    load,
    plain_dict,
    resolve,
    resolved_yaml,
    runtime,
    semantic,
    semantic_dict,
    semantic_hash,
    variant,
    versions,
)
from posttrain.config_help import describe, help_text, type_name
from posttrain.config_yaml import read_file, to_yaml


class Source(Config):
    path: str | list[str] = semantic(help="where it lies")
    weight: float = semantic(1.0, help="share of the mixture", gt=0)


class Data(Config):
    sources: dict[str, Source] = semantic({}, help="named sources")
    seq_len: int = semantic(128, help="positions of a row", gt=0)
    cache_dir: str = runtime("cache", help="folder of the cache")
    fields: dict[str, Any] = semantic({}, help="anything")


class Adam(Config):
    b2: float = semantic(0.95, help="second decay")
    lr: float = semantic(1e-5, help="rate")


class Muon(Config):
    lr: float = semantic(0.02, help="rate")
    steps: int = semantic(5, help="Newton-Schulz steps")


REGISTRY = {"adam": Adam, "muon": Muon}


class Mesh(Config):
    data: int = runtime(1, help="axis")


class Job(Config):
    job: Literal["train"] = semantic("train", help="the job")
    seed: int = semantic(0, help="seed")
    ceiling: float = semantic(1.0, help="a bound")
    note: str = semantic("", help="text")
    data: Data = semantic(Data(), help="data")
    optim: Annotated[Config, variant(REGISTRY, "adam")] = semantic(Adam(), help="optimiser")
    extra: Annotated[Config, variant(REGISTRY)] | None = semantic(None, help="a second one")
    mesh: Mesh = semantic(Mesh(), help="mesh")


class OneKind(Config):
    optim: Annotated[Adam, variant(REGISTRY, "adam")] = semantic(Adam(), help="optimiser")


@pytest.fixture
def write(tmp_path: Path):
    def _write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return _write


def problems_of(*args: Any, cls: type[Config] = Job, **kwargs: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(cls, *args, **kwargs)
    return {p.path: str(p) for p in caught.value.problems}


def test_files_merge_left_to_right_and_overrides_win(write):
    base = write("base.yaml", "job: train\nseed: 1\ndata: {seq_len: 64, sources: {a: {path: x}}}")
    over = write("over.yaml", "data:\n  seq_len: 32\n  sources:\n    b: {path: [y, z]}\n")
    config = load(Job, [base, over], ["seed=3", "data.sources.a.weight=0.5", "seed=4"])
    assert config.seed == 4
    assert config.data.seq_len == 32
    assert config.data.sources["a"] == Source(path="x", weight=0.5)
    assert config.data.sources["b"].path == ["y", "z"]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("1e-6", "ceiling", 1e-6),  # a string to YAML 1.1
        ("inf", "ceiling", float("inf")),
        (".inf", "ceiling", float("inf")),
        ("-1_0", "note", "-1_0"),
        ("010", "seed", 10),  # eight to YAML 1.1
        ("0x10", "seed", 16),
        ("2024-07-26", "note", "2024-07-26"),  # a date to YAML 1.1
        ("no", "note", "no"),  # False to YAML 1.1
        ("12:30", "note", "12:30"),  # 750 to YAML 1.1
        ("1.10", "note", "1.10"),  # a number where text is wanted stays as typed
        ("5", "note", "5"),
        ("'a=b'", "note", "a=b"),
    ],
)
def test_an_override_is_typed_by_its_field(text, key, value):
    found = getattr(load(Job, [], [f"{key}={text}"]), key)
    assert found == value
    assert type(found) is type(value)


def test_untyped_values_follow_yaml_1_2(write):
    path = write("a.yaml", "job: train\ndata: {fields: {a: 1e-6, b: on, c: null, d: true}}")
    assert load(Job, [path]).data.fields == {"a": 1e-6, "b": "on", "c": None, "d": True}


def test_every_problem_is_told_at_once_with_its_place(write):
    path = write(
        "a.yaml",
        "job: train\nseed: soon\nseed: later\ndata:\n  seq_len: -4\n  seqlen: 5\n"
        "  sources:\n    a: {weight: 2}\nlr: 3\noptim: {b3: 1}\nmesh: 7\n",
    )
    missing = path.replace("a.yaml", "none.yaml")
    found = problems_of(
        [path, missing], ["data.sources.b.path=3", "nonsense", "cieling=2", "x.y=1"]
    )
    assert f"{path}:3" in found["seed"]
    assert "'later'" in found["seed"]
    assert f"({path}:5)" in found["data.seq_len"]
    assert "-4" in found["data.seq_len"]
    assert "did you mean 'seq_len'?" in found["data.seqlen"]
    assert f"({path}:10)" in found["optim.b3"]
    assert "did you mean 'b2'?" in found["optim.b3"]
    assert "section" in found["mesh"]
    assert "(command line)" in found["cieling"]
    assert "(command line)" in found["x"]
    assert "did you mean 'ceiling'?" in found["cieling"]
    assert "lr" in found
    assert "data.sources.a.path" not in found, "the unreadable file may hold it"
    assert "data.sources.b.path" not in found, "3 is a path where text is wanted"
    with pytest.raises(ConfigError) as caught:
        load(Job, [path, missing], ["nonsense"])
    text = str(caught.value)
    assert "no such file" in text
    assert "nonsense" in text
    assert "duplicate key, first on line 2" in text


def test_a_missing_key_says_what_it_is(write):
    path = write("a.yaml", "job: train\ndata:\n  sources:\n    a: {weight: 2}\n")
    found = problems_of([path])
    assert "where it lies" in found["data.sources.a.path"]
    assert f"({path}:4)" in found["data.sources.a.path"]


def test_an_error_inside_one_branch_of_a_union_is_told_once():
    found = problems_of([], ["data.sources.a.path=[x, null]", "data.sources.b.path={x: 1}"])
    assert set(found) == {"data.sources.a.path.1", "data.sources.b.path"}
    assert "valid string or should be a valid list" in found["data.sources.b.path"]


def test_a_key_of_another_section_is_found_there():
    assert "did you mean 'data.seq_len'?" in problems_of([], ["mesh.seq_len=4"])["mesh.seq_len"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: [1\n", "not YAML"),
        ("a: 1\n  b: 2\n", "not YAML"),
        ("a: !!python/name:os.system\n", "unknown tag"),
        ("a: &x [*x]\n", "contains itself"),
        ("? [1, 2]\n: 3\n", "a key must be a word"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(write, text, said):
    with pytest.raises(ConfigError, match=said):
        load(Job, [write("a.yaml", text)])


def test_duplicates_are_found_deep_and_merge_keys_are_none(write):
    path = write("a.yaml", "job: train\ndata:\n  sources: {}\n  sources: {}\n")
    assert f"{path}:4" in problems_of([path])["data.sources"]
    path = write("b.yaml", "x: &x {path: p}\ny: {<<: *x, weight: 2}\n")
    layer = read_file(path)
    assert layer.tree["y"] == {"path": "p", "weight": 2}
    assert not layer.problems


def test_the_job_is_named_and_checked(write):
    other = write("other.yaml", "job: serve\nseed: 2\nport: 80\n")
    assert "posttrain serve" in problems_of([other])["job"]
    assert "job: train" in problems_of([write("none.yaml", "seed: 1")])["job"]
    assert load(Job, [], ["seed=1"]).job == "train"
    accepted = load(Job, [other], accepts={"serve": {}})
    assert (accepted.seed, accepted.job) == (2, "train")
    assert load(Job, [other], accepts={"serve": {"seed": 7}}).seed == 7
    assert load(Job, [other], ["seed=3"], accepts={"serve": {"seed": 7}}).seed == 3
    assert "port" in problems_of([other], ["port=81"], accepts={"serve": {}}), "typed for this job"


def test_another_type_drops_the_keys_of_the_old_one(write):
    base = write("base.yaml", "job: train\noptim: {lr: 0.1, b2: 0.5}\n")
    over = write("over.yaml", "optim: {type: muon, steps: 7}\n")
    assert load(Job, [base, over]).optim == Muon(steps=7)
    assert load(Job, [base], ["optim.steps=7", "optim.type=muon"]).optim == Muon(steps=7)
    assert load(Job, [base], ["optim.type=adam"]).optim == Adam(lr=0.1, b2=0.5)
    back = load(Job, [base, over], ["optim.type=adam"])
    assert back.optim == Adam()
    assert load(Job, [base], ["extra.type=muon"]).extra == Muon()


def test_a_type_may_be_the_users_own_class_and_a_wrong_one_is_told():
    own = load(Job, [], [f"optim.type={__name__}:Adam", "optim.b2=0.1"])
    assert own.optim == Adam(b2=0.1)
    outside = load(Job, [], [f"optim.type={__name__}:Mesh"])
    assert plain_dict(outside)["optim"]["type"] == f"{__name__}:Mesh"
    for name, said in (("adm", "'adam'"), ("no.such:X", "imported"), ("os:path", "Config class")):
        assert said in problems_of([], [f"optim.type={name}"])["optim"]
    found = problems_of([], [f"optim.type={__name__}:Muon"], cls=OneKind)
    assert f"is no Adam: derive it from {__name__}.Adam" in found["optim"]
    assert "'lr'" in problems_of([], ["optim.type=muon", "optim.lrr=1"])["optim.lrr"]
    assert "needs a `type`" in problems_of([], ["extra.lr=1"])["extra"]
    with pytest.raises(ValueError, match="unknown 'zebra'; known: adam, muon"):
        resolve(REGISTRY, "zebra")


def test_resolved_yaml_gives_the_same_config(write):
    config = load(
        Job,
        [],
        [
            "ceiling=inf",
            "note='on: # 1e-6'",
            "data.fields={a: '1e-6', b: 'no', c: 0.000001, d: 'null', e: [1, '2']}",
            "data.sources.s.path=[a, b]",
            "extra.type=muon",
        ],
    )
    text = resolved_yaml(config)
    assert "# jax: " in text
    assert f"# semantic hash: {semantic_hash(config)}" in text
    again = load(Job, [write("resolved.yaml", text)])
    assert again == config
    assert resolved_yaml(again) == text
    assert to_yaml({"a": "1e-6"}) == "a: '1e-6'\n"


def test_runtime_fields_are_outside_the_hash():
    a = load(Job, [], ["seed=1"])
    b = load(Job, [], ["seed=1", "mesh.data=8", "data.cache_dir=elsewhere"])
    c = load(Job, [], ["seed=2", "extra.type=adam"])
    assert a != b
    assert semantic_hash(a) == semantic_hash(b)
    assert semantic_hash(a) != semantic_hash(c)
    assert diff(a, b) == {}
    assert diff(a, c)["seed"] == (1, 2)
    assert diff(a, c)["extra.type"] == (None, "adam")
    assert diff(semantic_dict(a), c) == diff(a, c)
    assert "mesh" not in semantic_dict(a)


def test_help_lists_every_key_with_type_default_and_kind():
    rows = {row.key: row for row in describe(Job)}
    assert rows["data.cache_dir"].kind == "runtime"
    assert rows["data.seq_len"].kind == "semantic"
    assert rows["data.sources.<name>.path"].default == "required"
    assert rows["data.sources.<name>.path"].type == "str | [str, ...]"
    assert rows["optim.type"].default == "adam"
    assert rows["optim.steps"].help == "(type muon) Newton-Schulz steps"
    assert rows["job"].type == "train"
    text = help_text(Job, 80)
    assert "*mesh.data: int = 1" in text
    assert max(map(len, text.splitlines())) <= 80
    assert type_name(tuple[int, str]) == "[int, str]"


def test_versions_name_what_a_result_depends_on():
    found = versions()
    assert found["jax"][0].isdigit()
    assert {"python", "posttrain", "flax", "optax"} <= set(found)


def test_configs_are_frozen_and_errors_are_value_errors():
    with pytest.raises(ValueError, match="frozen"):
        Job().seed = 3
    assert config_errors.ConfigError is ConfigError
    assert issubclass(ConfigError, ValueError)
    assert config_fields.Config is Config
