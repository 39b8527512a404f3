"""Tests of an answer's code, from two processes; code.py runs this file in the sandbox.

The judge has the tests and runs no line of the answer; the other process has the answer's code and
sees no test. What the tests use of the answer stands for it here: a call goes over a pipe, and what
comes back is plain data of Python's own types, or an object that stands for one over there. So
nothing that the answer does to its interpreter (exits, prints, builtins, an object that equals
everything) reaches the comparison. A test that hands over what cannot be sent, a function, is run
in the answer's process. The standard library alone is imported: this is run for every answer.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import json
import operator
import os
import secrets
import symtable
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn

_PLAIN = (bool, int, float, str)
_BYTES = {"bytes": bytes, "bytearray": bytearray}
_ROWS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_AS_TEXT = {"Decimal": "decimal", "Fraction": "fractions"}
_MUTABLE = (list, dict, set, bytearray)
_PYTHON = {"attr": "getattr", "set": "setattr", "item": "getitem", "put": "setitem"}
_BETWEEN = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul",
            "and_", "or_", "xor", "lt", "le", "gt", "ge", "eq", "ne")  # fmt: skip


class Lost(BaseException):
    """The answer's process is gone, or speaks no sense: no test may take this for its error."""


class Unsendable(BaseException):
    """A test hands over what only exists in the judge's process."""


def pack(value: Any, keep: Callable[[Any], int]) -> Any:
    """A value as JSON. keep: the number by which an object is called that is no plain value; it
    may raise. Of a class of one's own that derives from a plain one the plain value is sent."""
    kind = type(value)
    if value is None or kind in _PLAIN:
        return value
    if kind is complex:
        return ["complex", [value.real, value.imag]]
    if kind is range:
        return ["range", [value.start, value.stop, value.step]]
    if kind.__name__ in _AS_TEXT and kind.__module__ == _AS_TEXT[kind.__name__]:
        return [kind.__name__, str(value)]
    for name, base in _BYTES.items():
        if isinstance(value, base):
            return [name, base(value).hex()]
    for name, base in _ROWS.items():
        if isinstance(value, base):
            return [name, [pack(one, keep) for one in base(value)]]
    if isinstance(value, dict):
        pairs = dict(value).items()
        return ["dict", [[pack(k, keep), pack(v, keep)] for k, v in pairs]]
    for base in _PLAIN:
        if isinstance(value, base):
            return base(value)
    return ["kept", keep(value)]


def unpack(value: Any, kept: Callable[[int], Any]) -> Any:
    """What `pack` made JSON of. Any error: it is none of that."""
    if not isinstance(value, list):
        return value
    kind, given = value
    if kind == "kept":
        return kept(given)
    if kind in _BYTES:
        return _BYTES[kind].fromhex(given)
    if kind in _ROWS:
        return _ROWS[kind](unpack(one, kept) for one in given)
    if kind == "dict":
        return {unpack(k, kept): unpack(v, kept) for k, v in given}
    if kind in _AS_TEXT:
        return getattr(importlib.import_module(_AS_TEXT[kind]), kind)(given)
    return {"complex": complex, "range": range}[kind](*given)


def _call(
    function: Any, args: list[Any], named: dict[str, Any]
) -> tuple[Any, list[Any], dict[str, Any]]:
    return function(*args, **named), args, named


DOES: dict[str, Callable[..., Any]] = {
    "call": _call,
    "attr": getattr,
    "set": setattr,
    "item": operator.getitem,
    "put": operator.setitem,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "iter": iter,
    "next": next,
    **{name: getattr(operator, name) for name in _BETWEEN},
}


def answer(lines: IO[str], out: IO[str]) -> NoReturn:
    """The answer's process: does what it is asked to, until there is nobody to ask."""
    objects: list[Any] = []
    space: dict[str, Any] = {"__name__": "solution", "__builtins__": builtins}

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def load(parts: list[str], names: list[str]) -> dict[str, Any]:
        for part in parts:
            exec(compile(part, "solution.py", "exec"), space)
        return {name: space[name] for name in names if name in space}

    def test(text: str) -> None:
        exec(compile(text, "test.py", "exec"), space)

    does = {**DOES, "load": load, "test": test}
    for line in lines:
        number, what, args = json.loads(line)
        try:
            told = [number, "", pack(does[what](*unpack(args, objects.__getitem__)), keep)]
        except BaseException as error:
            told = [number, type(error).__name__, str(error)]
        out.write(json.dumps(told) + "\n")
        out.flush()
    os._exit(0)


class Subject:
    """The answer's process, as the judge sees it."""

    def __init__(self, lines: IO[str], out: IO[str]):
        self._lines, self._out = lines, out

    def ask(self, what: str, *args: Any) -> Any:
        """What comes of it there. Lost, Unsendable; an error of Python's own is raised as it is."""
        number = secrets.token_hex(8)  # so that nothing can be said before it is asked
        sent = json.dumps([number, what, pack(list(args), self._known)])
        try:
            self._out.write(sent + "\n")
            self._out.flush()
            again, error, value = json.loads(self._lines.readline())
            if again != number or not isinstance(error, str):
                raise Lost
            value = unpack(value, lambda at: Stand(self, int(at)))
        except Exception as why:
            raise Lost from why
        if error:
            raise _raised(error, str(value))
        return value

    @staticmethod
    def _known(value: Any) -> int:
        if isinstance(value, Stand):
            return object.__getattribute__(value, "_number")
        raise Unsendable(type(value).__name__)


def _raised(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    error = kind.__new__(kind)
    error.args = (text,)
    return error


class Stand:
    """Stands for an object of the answer's: it can be called, asked for attributes and items,
    changed, and gone through. Operators work between two of them, never with a value of the test's:
    what is right would be for the answer to say."""

    __slots__ = ("_number", "_subject")

    def __init__(self, subject: Subject, number: int):
        object.__setattr__(self, "_subject", subject)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        value, after, named_after = self._subject.ask("call", self, list(args), named)
        now_named = [(named[key], named_after[key]) for key in named]
        for was, now in [*zip(args, after, strict=True), *now_named]:
            if type(was) in _MUTABLE and type(now) is type(was) and was != now:
                _become(was, now)
        return value

    def __hash__(self) -> int:
        return 0  # which of them are equal, the answer says

    def __iter__(self) -> Iterator[Any]:
        values = self._subject.ask("iter", self)
        while True:
            try:
                value = self._subject.ask("next", values)
            except StopIteration:
                return
            yield value


def _asks(name: str, between: bool) -> Callable[..., Any]:
    def method(self: Stand, *args: Any) -> Any:
        if between and not isinstance(args[0], Stand):
            return NotImplemented
        return self._subject.ask(name, self, *args)

    return method


for _name in {*DOES} - {"call", "iter"}:
    setattr(Stand, f"__{_PYTHON.get(_name, _name.strip('_'))}__", _asks(_name, _name in _BETWEEN))


def _become(was: Any, now: Any) -> None:
    """A list that was handed over is what the answer has made of it, and so on."""
    was.clear()
    (was.update if isinstance(was, dict | set) else was.extend)(now)


def _names(tests: Sequence[str], before: str) -> tuple[list[str], list[str]]:
    """(names that the tests take from the answer, modules that they use without an import).

    A name that the tests bind, or `before` imports, is their own. A builtin is, too, unless they
    name nothing else: an answer may be asked for its own `sum`, and may not bring its own `abs`.
    """
    loaded, own, called, looked_into = set[str](), set[str](), set[str](), set[str]()
    for symbol, outside in _symbols(before):
        if outside and symbol.is_imported():
            own.add(symbol.get_name())
    for text in tests:
        for symbol, outside in _symbols(text):
            if outside and (symbol.is_assigned() or symbol.is_imported()):
                own.add(symbol.get_name())
            elif symbol.is_referenced() and (outside or symbol.is_global()):
                loaded.add(symbol.get_name())
        for node in _walk(text):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                looked_into.add(node.value.id)
    free = loaded - own
    modules = (free & looked_into & sys.stdlib_module_names) - called
    taken = {name for name in free - modules if not hasattr(builtins, name)}
    return sorted(taken or free - modules), sorted(modules)


def _symbols(text: str) -> Iterator[tuple[symtable.Symbol, bool]]:
    """The names of each scope, and whether it is the outermost; a def or a class assigns one."""
    try:
        outermost = symtable.symtable(text, "test.py", "exec")
    except (SyntaxError, ValueError):
        return
    scopes = [outermost]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        yield from ((symbol, scope is outermost) for symbol in scope.get_symbols())


def _walk(text: str) -> list[ast.AST]:
    try:
        return list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return []  # of a test: it fails when it is run


def _imports(before: str) -> list[ast.AST]:
    return [node for node in _walk(before) if isinstance(node, ast.Import | ast.ImportFrom)]


def judge(work: Mapping[str, Any], subject: Subject) -> list[int]:
    """1 for each test that passes, 0 for one that does not, in order; up to the first of these
    unless `partial` asks for all. [] where the answer's code does not run."""
    names, modules = _names(work["tests"], work["before"])
    space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    passed: list[int] = []
    try:
        space |= subject.ask("load", [work["before"], work["code"]], names)
        for node in _imports(work["before"]):
            exec(ast.unparse(node), space)
        space |= {name: importlib.import_module(name) for name in modules}
    except BaseException:
        return []
    for text in work["tests"]:
        passed.append(int(_passes(text, space, subject)))
        if not (passed[-1] or work["partial"]):
            break
    return passed


def _passes(text: str, space: dict[str, Any], subject: Subject) -> bool:
    try:
        try:
            exec(compile(text, "test.py", "exec"), space)
        except Unsendable:
            subject.ask("test", text)
    except BaseException:
        return False
    return True


def main() -> None:
    """Reads the work and a secret from standard input; writes the secret and what has passed."""
    sys.set_int_max_str_digits(0)
    asked, to_answer = os.pipe()
    told, to_judge = os.pipe()
    if os.fork() == 0:  # before anything is read
        nowhere = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nowhere, number)
        for number in (nowhere, to_answer, told):
            os.close(number)
        answer(os.fdopen(asked), os.fdopen(to_judge, "w"))
    os.close(asked)
    os.close(to_judge)
    _hide()
    work, secret = json.loads(sys.stdin.readline()), sys.stdin.readline().strip()
    out, sys.stdout = os.dup(1), io.StringIO()  # what tests print
    passed = judge(work, Subject(os.fdopen(told), os.fdopen(to_answer, "w")))
    os.write(out, (secret + json.dumps(passed) + "\n").encode())
    os._exit(0)


def _hide() -> None:
    """The answer's process runs as the same user: it must not look into this one."""
    import ctypes

    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


if __name__ == "__main__":
    main()
