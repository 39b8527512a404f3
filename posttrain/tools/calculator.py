"""A calculator: arithmetic on numbers, worked out by a parser of its own. Nothing is executed."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from posttrain.config import Config
from posttrain.tools.base import Tool, ToolError, function_schema

Number = Fraction | float

_MAX_CHARACTERS = 1000
_MAX_BITS = 4096  # of a numerator or denominator: nobody waits for 9**9**9
_SIGNS: Mapping[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": lambda x: _root(x),
    "log": lambda x: math.log(x),
    "exp": lambda x: math.exp(x),
}


class Calculator(Config):
    """`calculator(expression)`: + - * / // % **, brackets, abs min max round floor ceil sqrt."""

    def tool(self) -> Tool:
        about = "The value of an arithmetic expression, such as (3 + 4) * 5 / 2"
        schema = function_schema(
            "calculator", about, {"expression": {"type": "string"}}, ["expression"]
        )
        return Tool("calculator", schema, lambda a: calculate(a["expression"]), quick=True)


def calculate(expression: str) -> str:
    """The value as text: integers exactly, all else to 12 digits; 0.1 + 0.2 is 0.3.

    ToolError where it is no arithmetic, divides by zero or grows too large.
    """
    if len(expression) > _MAX_CHARACTERS:
        raise ToolError(f"more than {_MAX_CHARACTERS} characters")
    # what people write for the same operators
    for theirs, ours in (("\u00d7", "*"), ("\u00f7", "/"), ("\u2212", "-"), ("^", "**")):
        expression = expression.replace(theirs, ours)
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _text(_value(tree.body))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ValueError) and "math domain" in str(error):
            raise ToolError(f"{expression!r} has no real value") from error
        raise ToolError(f"{expression!r} is no arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except OverflowError as error:
        raise ToolError("the value is too large") from error


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _small(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _small(_power(left, right))
        if type(node.op) in _OPERATORS:
            return _small(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is None:
            known = ", ".join(_FUNCTIONS)
            raise ToolError(f"there is no function {node.func.id!r}; there are: {known}")
        arguments = [_value(argument) for argument in node.args]
        if node.func.id == "round" and len(arguments) == 2:
            arguments[1] = _digits(arguments[1])
        try:
            value = function(*arguments)
        except TypeError as error:
            raise ToolError(f"{node.func.id} does not take {len(arguments)} arguments") from error
        return _small(value if isinstance(value, float) else Fraction(value))
    raise ToolError(f"{ast.unparse(node)!r} is no arithmetic: numbers and operators alone")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent.numerator) > _MAX_BITS:
            raise OverflowError
        return base**exponent.numerator
    value = float(base) ** float(exponent)
    if isinstance(value, complex):  # the root of a negative number
        raise ValueError("math domain error")
    return value


def _root(x: Number) -> Number:
    """Exact where it can be."""
    if isinstance(x, Fraction) and x >= 0:
        root = Fraction(math.isqrt(x.numerator), math.isqrt(x.denominator))
        if root * root == x:
            return root
    return math.sqrt(x)


def _digits(x: Number) -> Any:
    if not isinstance(x, Fraction) or x.denominator != 1 or abs(x) > 100:
        raise ToolError("round takes a whole number of digits, 100 at most")
    return int(x)


def _small(x: Number) -> Number:
    if isinstance(x, float):
        if not math.isfinite(x):
            raise OverflowError
    elif max(x.numerator.bit_length(), x.denominator.bit_length()) > _MAX_BITS:
        raise OverflowError
    return x


def _text(x: Number) -> str:
    if isinstance(x, Fraction):
        if x.denominator == 1:
            return str(x.numerator)
        return f"{float(x):.12g}"
    return f"{x:.12g}"
