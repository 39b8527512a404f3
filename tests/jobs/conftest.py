"""Training runs in this process, on some of the fake devices."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from posttrain import config
from posttrain.jobs import preference, reward_model, rl, sft
from tests.jobs.rl_task import RL_KEYS
from tests.jobs.runs import GOLDEN, GOLDEN_PAIRS, Finished, Runner


@pytest.fixture(scope="session")
def golden_keys(data_dir: Path) -> list[str]:
    """GOLDEN with the golden model and data, as key=value."""
    golden = data_dir / "golden"
    return [
        *GOLDEN,
        f"model.path={golden / 'model'}",
        f"data.sources.gsm8k.path={golden}/sft.jsonl",
    ]


@pytest.fixture(scope="session")
def run_sft(golden_keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run_sft(*key=value, devices=8, folder=new) -> Finished, from the golden settings."""

    def run(*keys: str, devices: int = 8, folder: Path | None = None) -> Finished:
        from posttrain.train import setup  # what it imports is not needed to collect tests

        folder = folder or tmp_path_factory.mktemp("run")
        cfg = config.load(sft.Config, [], [*golden_keys, f"run_dir={folder}", *keys])
        code = setup.run(cfg, jax.devices()[:devices])
        return Finished(code, folder)

    return run


@pytest.fixture(scope="session")
def golden_pairs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """GOLDEN_PAIRS with the golden model and pairs, as key=value.

    TRL's completion ends with what the template puts after <|im_end|>, a newline: this template
    has it among what is trained. tests/parity/test_golden_dpo.py compares the token lists.
    """
    golden = data_dir / "golden"
    template = (golden / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    end = "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    assert template.count(end) == 1
    variant = tmp_path_factory.mktemp("template") / "trl.jinja"
    inside = "'<|im_end|>\n' }}{% endgeneration %}"
    variant.write_text(template.replace(end, inside), encoding="utf-8")
    return [
        *GOLDEN_PAIRS,
        f"model.path={golden / 'model'}",
        f"data.sources.prefs.path={golden}/prefs.jsonl",
        f"chat.template={variant}",
    ]


@pytest.fixture(scope="session")
def tiny_folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What needs no golden figures: a tiny model of the golden one's vocabulary, no weights yet."""
    golden, folder = data_dir / "golden" / "model", tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((golden / name).read_bytes())
    cfg = json.loads((golden / "config.json").read_text())
    cfg |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with random weights in a file, wide enough that a step moves the loss."""
    from posttrain.models import hf
    from posttrain.models.spec import ModelConfig
    from tests.models.tiny import mesh_of

    folder = tmp_path_factory.mktemp("tiny-model")
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        cfg = ModelConfig(path=str(tiny_folder), random_init=True, vocab_multiple=1)
        made = hf.open_model(cfg, mesh)
        hf.save(folder, made.spec, made.state)
    return folder


@pytest.fixture(scope="session")
def tiny_sft(tiny_model: Path) -> list[str]:
    """Further keys of SFT runs of it: few and short conversations."""
    return [
        *(f"model.path={tiny_model}", "data.seq_len=256", "data.too_long=drop"),
        *("data.sources.gsm8k.limit=24", "batch.examples=4"),
    ]


@pytest.fixture(scope="session")
def tiny_pairs(tiny_folder: Path) -> list[str]:
    """Further keys of runs of preference: a tiny random model, few and short pairs."""
    return [
        *(f"model.path={tiny_folder}", "model.random_init=true"),
        *("data.seq_len=512", "data.too_long=drop", "data.sources.prefs.limit=20"),
        *("batch.packing=best_fit", "batch.order=shuffle", "batch.examples=2"),
    ]


@pytest.fixture(scope="session")
def run_preference(golden_pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run_preference(*key=value, devices=8, folder=new) -> Finished, from the golden settings.

    Its cache is its own, beside the folder: nothing that another run computed is found.
    """

    def run(*keys: str, devices: int = 8, folder: Path | None = None) -> Finished:
        from posttrain.train import setup

        folder = folder or tmp_path_factory.mktemp("run")
        paths = [f"run_dir={folder}", f"data.cache_dir={folder}.cache"]
        cfg = config.load(preference.Config, [], [*golden_pairs, *paths, *keys])
        given = jax.devices()[:devices]
        reference = cfg.reference_sync or cfg.reference
        code = setup.run(cfg, given, kind=cfg.loss.data, reference=reference)
        return Finished(code, folder)

    return run


@pytest.fixture(scope="session")
def golden_reward(data_dir: Path) -> list[str]:
    """GOLDEN_PAIRS with the golden reward model and pairs, as key=value."""
    golden = data_dir / "golden"
    return [
        *GOLDEN_PAIRS,
        f"model.path={golden / 'model_rm'}",
        f"data.sources.prefs.path={golden}/prefs.jsonl",
    ]


@pytest.fixture(scope="session")
def run_reward_model(golden_reward: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run_reward_model(*key=value, devices=8, folder=new) -> Finished, from the golden settings."""

    def run(*keys: str, devices: int = 8, folder: Path | None = None) -> Finished:
        from posttrain.train import setup

        folder = folder or tmp_path_factory.mktemp("run")
        paths = [f"run_dir={folder}", f"data.cache_dir={folder}.cache"]
        cfg = config.load(reward_model.Config, [], [*golden_reward, *paths, *keys])
        return Finished(setup.run(cfg, jax.devices()[:devices], kind="pairs", head="score"), folder)

    return run


@pytest.fixture(scope="session")
def run_rl(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run_rl(*key=value, devices=1, folder=new) -> Finished, from RL_KEYS."""

    def run(*keys: str, devices: int = 1, folder: Path | None = None) -> Finished:
        from posttrain.train import setup_online

        folder = folder or tmp_path_factory.mktemp("run")
        own = [f"model.path={tiny_model}", f"run_dir={folder}"]
        cfg = config.load(rl.Config, [], [*RL_KEYS, *own, *keys])
        return Finished(setup_online.run(cfg, jax.devices()[:devices]), folder)

    return run
