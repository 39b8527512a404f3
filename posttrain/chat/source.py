"""Where a chat template comes from: a name, a file, or the model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.chat.templates import TEMPLATES
from posttrain.config import ConfigError


def find_source(folder: Path, stored: Any, name: str | None) -> str:
    """The template's text.

    name: `chat.template`: None for the model's own, one of TEMPLATES, the name of one of the
    model's several templates, or a file. stored: what tokenizer_config.json holds. ConfigError
    where nothing is found.
    """
    own = _own_templates(folder, stored)
    if name is None:
        if "default" in own:
            return own["default"]
        raise ConfigError(
            f"{folder} holds no chat template (a base model?): set chat.template to a file or to "
            f"one of {_names(TEMPLATES)}" + (f" or {_names(own)}" if own else "")
        )
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name in own:
        return own[name]
    file = Path(name)
    if file.is_file():
        return file.read_text(encoding="utf-8")
    raise ConfigError(
        f"chat.template: {name!r} is neither a file nor one of {_names({**TEMPLATES, **own})}"
    )


def _own_templates(folder: Path, stored: Any) -> dict[str, str]:
    """The model's templates by name; a file beats what tokenizer_config.json holds."""
    own: dict[str, str] = {}
    if isinstance(stored, str):
        own["default"] = stored
    elif stored:
        own.update((entry["name"], entry["template"]) for entry in stored)
    file = folder / "chat_template.jinja"
    if file.is_file():
        own["default"] = file.read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        own[file.stem] = file.read_text(encoding="utf-8")
    return own


def _names(templates: dict[str, str]) -> str:
    return ", ".join(sorted(templates))
