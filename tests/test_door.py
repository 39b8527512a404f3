"""What a config names and is not there is an error of the config: exit code 2, do not retry."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.chat.jinja import ChatEnvironment, compile_template
from posttrain.chat.source import find_source
from posttrain.chat.tokenizer import Tokenizer
from posttrain.config import ConfigError
from posttrain.models.folder import local_folder


def test_a_model_folder_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no such folder, and not a hub id"):
        local_folder("/no/such/model")


def test_a_template_that_is_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no chat template"):
        find_source(tmp_path, None, None)
    with pytest.raises(ConfigError, match="'chatlm' is neither a file nor one of chatml"):
        find_source(tmp_path, None, "chatlm")
    with pytest.raises(ConfigError, match="chat template, line 2"):
        compile_template(ChatEnvironment("2025-01-01"), "\n{% if %}")


def test_a_runs_folder_points_to_its_export(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="convert the tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"it is a run's folder: name {tmp_path / 'export'}"):
        Tokenizer.load(tmp_path)
