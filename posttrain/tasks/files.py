"""Tasks whose problems are the rows of files: read, checked all at once, split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import model_validator

from posttrain.config import ConfigError, semantic
from posttrain.data.config import SourceConfig
from posttrain.data.normal import normalise
from posttrain.data.rows import Defect, Problem, RowError, show, text_problem, wrong_type
from posttrain.tasks.base import Prompts, Question, Split, Task, is_held_out
from posttrain.types import Prompt

T = TypeVar("T")
Paths = str | tuple[str, ...] | None


class FileTask(Task):
    """Problems from files, in their order. `read` makes a question of a row."""

    path: Paths = semantic(
        None, help="file, glob or list of them with the problems, as data.sources.*.path"
    )
    held_out_path: Paths = semantic(None, help="likewise, of problems that are never trained on")
    held_out_one_in: int | None = semantic(
        None,
        ge=2,
        help="without held_out_path: one question in so many of `path` is held out, by its hash",
    )
    limit: int | None = semantic(None, gt=0, help="only the first problems of each split")

    @model_validator(mode="after")
    def _some_path(self) -> FileTask:
        if not self.path and not self.held_out_path:
            raise ValueError("names no file: set path (or held_out_path, if nothing is trained)")
        if self.held_out_path and self.held_out_one_in:
            raise ValueError("held_out_path and held_out_one_in: say one of the two")
        return self

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Question | None:
        """The question of a row; None where an option of the task leaves the row out. RowError
        with everything that is wrong with it."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """ConfigError: the task has no files of this split, or none are found; BadRows."""
        if split == "held_out" and self.held_out_path:
            paths, field = self.held_out_path, "task.held_out_path"
        else:
            paths, field = self.path, "task.path"
        if split == "held_out" and not (self.held_out_path or self.held_out_one_in):
            raise ConfigError(
                "task: no problem is held out: name their files in held_out_path, or set "
                "held_out_one_in (8: an eighth of path's)"
            )
        if not paths:
            raise ConfigError(f"{field}: names no file, and problems to train on are asked for")
        found = [
            (number, question)
            for number, question in enumerate(read_all(paths, field, self._one_each()))
            if question is not None
            and (
                self.held_out_one_in is None
                or is_held_out(_key(question), self.held_out_one_in) == (split == "held_out")
            )
        ][: self.limit]
        if not found:
            raise ConfigError(f"{field}: {paths} has no {split} problem")
        return Prompts(len(found), lambda i: self.prompt(split, *found[i]))

    def _one_each(self) -> Callable[[Mapping[str, Any]], Question | None]:
        """The reader, for rows whose own ids are all different."""
        read, seen = self.reader(), set[str]()

        def one(row: Mapping[str, Any]) -> Question | None:
            question = read(row)
            if question and question.id:
                if question.id in seen:
                    fix = "give each row an id of its own"
                    found = f"{show(question.id)} is the id of an earlier row"
                    raise RowError([Problem("id", found, fix)])
                seen.add(question.id)
            return question

        return one

    def reader(self) -> Callable[[Mapping[str, Any]], Question | None]:
        """What makes a question of a row: `read`, where other files have no part in it."""
        return self.read


def _key(question: Question) -> str:
    """What is asked: the split goes by it."""
    said = [m["content"] for m in question.messages if m["role"] != "system"]
    return "\n".join([*said, question.text])


def read_all(paths: Paths, field: str, read: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """read(row) of every row of the files, which the config names as `field`.

    ConfigError: there are no such files. BadRows, with all defects: rows that are no objects, or
    for which `read` raises RowError.
    """
    from posttrain.data.prepare import BadRows
    from posttrain.data.sources import find_files, read_blocks

    source = SourceConfig(path=paths or ())
    try:
        files = find_files(source)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error
    made: list[T] = []
    defects: list[Defect] = []
    count = 0
    for row in (row for block in read_blocks(source, files) for row in block.rows()):
        count += 1
        problems = row.problems
        if not problems:
            try:
                made.append(read(as_object(row.value)))
            except RowError as error:
                problems = error.problems
        defects += [Defect(row.file, row.line, p.field, p.found, p.fix) for p in problems]
    if defects:
        raise BadRows(defects, count, f"repair these rows, or remove them ({field})")
    return made


def as_object(value: Any) -> Mapping[str, Any]:
    """A row as an object. RowError: it is none."""
    if not isinstance(value, Mapping):
        raise RowError([wrong_type("row", value, "an object")])
    return value


def texts(row: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The columns, each a text that is not empty. RowError with all that are none."""
    problems = [found for name in names if (found := text_problem(row.get(name), name))]
    has = f" (the row has {', '.join(map(str, row)) or 'no columns'})"
    if problems:
        raise RowError([p if p.field in row else replace(p, found=p.found + has) for p in problems])
    return tuple(row[name] for name in names)


def asked(messages: Any, where: str, tools: Any = None) -> Question:
    """The question of a prompt's messages and tools. RowError: they are no messages, or the last of
    them asks nothing."""
    answer = {"role": "assistant", "content": "."}  # the normal form is that of whole conversations
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RowError([wrong_type(where, messages, "a list of messages")])
    places = [*(f"{where}[{i}]" for i in range(len(messages))), where]
    made = normalise([*messages, answer], where=where, places=places, tools=tools)
    *said, last = made.messages[:-1]
    if last["role"] not in ("user", "tool"):
        found = f"the last message is of role {last['role']}: it asks nothing"
        raise RowError([Problem(where, found, "end with the message that is to be answered")])
    if last["role"] == "tool":
        return Question("", tools=made.tools, messages=(*said, last))
    return Question(last["content"], tools=made.tools, messages=tuple(said))
