"""What a run that learns online refuses before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.chat.tokenizer import Tokenizer
from posttrain.config import ConfigError
from posttrain.train.setup_online import refuse_another_vocabulary


def test_a_critic_that_reads_other_ids_is_refused(data_dir: Path, tmp_path: Path) -> None:
    golden = data_dir / "golden" / "model"
    critic = SimpleNamespace(path=str(golden))
    model, round_ = SimpleNamespace(new_tokens=()), SimpleNamespace(seq_len=128)
    cfg = SimpleNamespace(critic=critic, model=model, round=round_)
    policy = Tokenizer.load(golden)
    refuse_another_vocabulary(cfg, policy)

    described = json.loads((golden / "tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    one, other = "a", "b"
    vocab[one], vocab[other] = vocab[other], vocab[one]
    described["added_tokens"].append({**described["added_tokens"][-1], "id": policy.size,
                                      "content": "<|pad|>"})  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    spec = json.loads((golden / "config.json").read_text()) | {"max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    critic.path = str(tmp_path)
    with pytest.raises(ConfigError) as told:
        refuse_another_vocabulary(cfg, policy)
    assert "critic.path" in str(told.value)
    assert f"2 of the policy's {policy.size:,} token ids" in str(told.value)
    assert "'a' here, 'b' there" in str(told.value)
    assert "its context is 64, and round.seq_len 128" in str(told.value)
    critic.path, wider = str(golden), Tokenizer.load(_unswapped(tmp_path, golden))
    with pytest.raises(ConfigError, match=r"1 of the policy's .* '<\|pad\|>' here, '' there"):
        refuse_another_vocabulary(cfg, wider)


def _unswapped(folder: Path, golden: Path) -> Path:
    described = json.loads((folder / "tokenizer.json").read_text())
    vocab = json.loads((golden / "tokenizer.json").read_text())["model"]["vocab"]
    described["model"]["vocab"] = vocab
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder
