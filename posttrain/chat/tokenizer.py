"""A Hugging Face tokenizer folder read with `tokenizers` alone.

Text is encoded as it stands: BOS and EOS come from the template or from `text_example`, never from
`encode`. Padding and truncation that a tokenizer.json switches on are switched off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from posttrain.chat.control import Intervals, SectionEncoder, covers, is_control
from posttrain.chat.encoding import Encoding, LazyOffsets
from posttrain.config import ConfigError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_NAMED += ("mask_token",)


class Tokenizer:
    """tokenizer.json and what lies beside it. Build one with `Tokenizer.load`."""

    def __init__(
        self, description: str, config: dict[str, Any], stop_ids: Iterable[int] = ()
    ) -> None:
        """description: tokenizer.json; config: tokenizer_config.json with the special tokens of
        special_tokens_map.json; stop_ids: end tokens named by the model's configs, by id."""
        parsed = json.loads(description)
        parsed["truncation"] = parsed["padding"] = None
        self._config = config
        self._whole = tokenizers.Tokenizer.from_str(json.dumps(parsed))
        # the same without a post-processor, which may trim offsets and adds special tokens
        self._parsed = parsed
        bare = {**parsed, "post_processor": None}
        self._bare = tokenizers.Tokenizer.from_str(json.dumps(bare))
        self._sections: SectionEncoder | None = None
        added = self._whole.get_added_tokens_decoder()
        vocabulary = self._whole.get_vocab(with_added_tokens=True)
        self.size: int = max(vocabulary.values()) + 1
        self.special_ids: frozenset[int] = frozenset(i for i, t in added.items() if t.special)
        self.added_tokens: dict[str, int] = {t.content: i for i, t in added.items()}
        self._control = np.zeros(self.size, bool)
        for token in parsed["added_tokens"]:
            self._control[token["id"]] = is_control(token)
        self.special_tokens: dict[str, str] = _named_tokens(config)
        self.bos_id = self._id("bos_token")
        self.eos_id = self._id("eos_token")
        self.pad_id = self._id("pad_token")
        extra = [i for i in stop_ids if i < self.size]
        if self.eos_id is None and extra:
            self.eos_id = extra[0]
            self.special_tokens["eos_token"] = self.token(extra[0])
        own = [] if self.eos_id is None else [self.eos_id]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *extra]))
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        self._state = (description, config, tuple(stop_ids))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder. ValueError where tokenizer.json is missing or no JSON."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            export = folder / "export" / "tokenizer.json"
            raise ConfigError(
                f"{folder} holds no tokenizer.json; "
                + (
                    f"it is a run's folder: name {export.parent}"
                    if export.is_file()
                    else "convert the tokenizer with transformers "
                    "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
                )
            )
        config = _read(folder / "tokenizer_config.json")
        for name, value in _read(folder / "special_tokens_map.json").items():
            config.setdefault(name, value)
        stops: list[int] = []
        for source in ("generation_config.json", "config.json"):
            found = _read(folder / source).get("eos_token_id")
            if found is not None:
                stops += found if isinstance(found, list) else [found]
        return cls(file.read_text(encoding="utf-8"), config, dict.fromkeys(stops))

    def __reduce__(self) -> Any:
        return Tokenizer, self._state

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._whole.token_to_id(token)

    @property
    def chat_template(self) -> Any:
        """The template in tokenizer_config.json: text, a list of {name, template}, or None."""
        return self._config.get("chat_template")

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own rule puts BOS before a text."""
        start = self._whole.encode("", add_special_tokens=True).ids[:1]
        return self.bos_id is not None and start == [self.bos_id]

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, None where there is none."""
        return self._whole.token_to_id(token)

    def token(self, index: int) -> str:
        """The token of an id, as it stands in the vocabulary."""
        return self._whole.id_to_token(index) or ""

    def encode(
        self,
        text: str,
        *,
        trusted: Intervals | None = None,
        prose: Intervals = (),
        in_prose: frozenset[str] = frozenset(),
    ) -> Encoding:
        """Tokens of a text; never adds BOS or EOS.

        trusted: sorted, disjoint character intervals written by the template (None: all of it).
        Control tokens typed anywhere else become tokens of plain text; in the intervals of
        `prose`, those named in `in_prose` stay tokens. ValueError where the vocabulary gives a
        control token for plain text all the same (unigram models can).
        """
        found = self._bare.encode(text, add_special_tokens=False)
        return self._checked(text, found, trusted, prose, in_prose)

    def encode_batch(
        self,
        texts: Sequence[str],
        trusted: Sequence[Intervals | None],
        prose: Sequence[Intervals],
        in_prose: frozenset[str],
    ) -> list[Encoding | ValueError]:
        """`encode` of many texts, on the threads of `tokenizers`; an error stands in its place."""
        out: list[Encoding | ValueError] = []
        found = self._bare.encode_batch(list(texts), add_special_tokens=False)
        for row in zip(texts, found, trusted, prose, strict=True):
            try:
                out.append(self._checked(*row, in_prose))
            except ValueError as error:
                out.append(error)
        return out

    def _checked(
        self, text: str, found: Any, trusted: Any, prose: Any, in_prose: frozenset[str]
    ) -> Encoding:
        """What the whole tokenizer gave, unless it took typed text for a control token."""
        array = np.array(found.ids, np.int32)
        lazy = LazyOffsets(found, len(array))
        places: list[tuple[int, int]] = []
        for k in np.flatnonzero(self._control[array]).tolist():
            place = found.token_to_chars(k)
            core = _core(text, *place)
            if core != place:
                lazy.changed[k] = core
            places.append(core)
        if trusted is None or not _strays(text, places, trusted, prose, in_prose):
            return Encoding(array, lazy)
        if self._sections is None:
            self._sections = SectionEncoder(self._parsed)
        ids, offsets = self._sections.encode(text, trusted, prose, in_prose)
        array = np.array(ids, np.int32)
        hits = np.flatnonzero(self._control[array]).tolist()
        strays = _strays(text, [offsets[k] for k in hits], trusted, prose, in_prose)
        if strays:
            k = hits[strays[0]]
            raise ValueError(
                f"the tokenizer gives the control token {self.token(ids[k])!r} for plain "
                f"text at character {offsets[k][0]}; remove it from the text"
            )
        return Encoding(array, offsets)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of a list of ids."""
        return self._whole.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def with_added_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """A tokenizer with these special tokens beside its own; known ones are left alone."""
        new = [token for token in tokens if token not in self.added_tokens]
        wider = tokenizers.Tokenizer.from_str(self._state[0])
        wider.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in new]
        )
        return Tokenizer(wider.to_str(), self._config, self._state[2])

    def padding_apart(self, ends: Iterable[int]) -> Tokenizer:
        """A tokenizer whose padding token ends no text; `ends`: ids that do, beside its own stops.

        transformers' sequence classifiers read the last token that is not the padding token: a text
        that ends with it would be read one token early. ValueError where no special token is left.
        """
        taken = {*ends, *self.stop_ids}
        if self.pad_id is not None and self.pad_id not in taken:
            return self
        free = [i for i in sorted(self.special_ids) if i not in taken]
        if not free:
            raise ValueError(
                "the tokenizer has no special token that can pad, since each may end a text: add "
                "one, as in model.new_tokens=['<|pad|>']"
            )
        # one that is named so, else any but BOS, which a text of nothing else would consist of
        best = min(free, key=lambda i: ("pad" not in self.token(i).lower(), i == self.bos_id, i))
        description, config, stops = self._state
        return Tokenizer(description, {**config, "pad_token": self.token(best)}, stops)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as transformers reads them.

        The class written is the one that takes tokenizer.json as it stands: LlamaTokenizer, say,
        builds a pipeline of its own in transformers 5, with other ids (see `warnings`).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._whole.to_str(pretty=True), encoding="utf-8")
        config = {**self._config, "tokenizer_class": "PreTrainedTokenizerFast"}
        for name in ("chat_template", "backend", "added_tokens_decoder", "auto_map"):
            config.pop(name, None)
        config.update(self.special_tokens)
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )

    def warnings(self) -> list[str]:
        """What a user should know of this tokenizer; [] for nothing."""
        name = str(self._config.get("tokenizer_class"))
        prepends = '"Prepend"' in json.dumps(self._parsed["normalizer"])
        if name.startswith("LlamaTokenizer") and prepends and not self._config.get("legacy", True):
            return [
                f"tokenizer_class {name} with legacy: false makes transformers 5 ignore the "
                "normalizer of tokenizer.json (no space before a text that follows a control "
                "token); ids here are those of tokenizer.json, and so is the exported model"
            ]
        return []

    def fingerprint(self) -> str:
        """A hash of everything that decides ids."""
        state = json.dumps([self._parsed, self.special_tokens, self.stop_ids], sort_keys=True)
        return hashlib.sha256(state.encode()).hexdigest()


class StreamDecoder:
    """Text of tokens that come one at a time; holds back what is no whole character yet."""

    _WINDOW = 8  # tokens decoded again at each push: enough for any character's bytes

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        # what was given out last, for decoders that treat the first token or loose bytes apart
        self._context: list[int] = []
        self._fresh: list[int] = []

    def push(self, index: int) -> str:
        """The finished text that this token adds, "" while a character is unfinished."""
        self._fresh.append(index)
        text = self._text(self._context + self._fresh)
        if text.endswith("\ufffd") and len(self._fresh) < self._WINDOW:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is left at the end, broken characters as U+FFFD."""
        return self._give(self._text(self._context + self._fresh))

    def pending(self) -> str:
        """The whole characters among what is held back."""
        text = self._text(self._context + self._fresh)
        return text[len(self._text(self._context)) :].rstrip("\ufffd")

    def _give(self, text: str) -> str:
        new = text[len(self._text(self._context)) :]
        if self._fresh:
            self._context, self._fresh = self._fresh, []
        return new

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _core(text: str, start: int, end: int) -> tuple[int, int]:
    """A control token's place without the white space it swallowed: that space may be somebody
    else's, and the token must not be trained for it."""
    piece = text[start:end]
    core = piece.strip()
    if not core or len(core) == len(piece):
        return start, end
    start += piece.index(core)
    return start, start + len(core)


def _strays(
    text: str,
    places: Sequence[tuple[int, int]],
    trusted: Intervals,
    prose: Intervals,
    in_prose: frozenset[str],
) -> list[int]:
    """Which of the control tokens at these places are made from characters that may not."""
    out = []
    for k, (start, end) in enumerate(places):
        if covers(trusted, start, end):
            continue
        if not (text[start:end] in in_prose and covers(prose, start, end)):
            out.append(k)
    return out


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from error


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and so on; a value may be text or {"content": text, ...}."""
    out = {}
    for name in _NAMED:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value:
            out[name] = value
    return out
