"""Reads the text of a Python configuration of mmengine or mmcv: its assignments of literals. Nothing is evaluated.

`Config.pretty_text` writes such texts into checkpoints: `model = dict(type='EncoderDecoder', backbone=dict(...))`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from fastuper.io.messages import shown
from fastuper.weights.errors import CheckpointError

LONGEST = 2**20
"""The longest text that is read, in characters."""

BRACES = 20_000
"""The largest number of opening braces: the time to parse an f-string grows as the square of its parts."""

PARTS = 2**20
"""The largest number of values in a configuration, those inside lists and dictionaries among them."""

DEEPEST = 100
"""The deepest nesting of lists and dictionaries in a configuration."""

LARGEST = 2**63
"""The largest integer in a configuration."""

OPERATIONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class Unread:
    """The value of an expression that is no literal: to read it is an error.

    Args:
        text: the expression, or its first line.
    """

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return f"Unread({self.text!r})"

    def _refuse(self, *_: Any) -> NoReturn:
        raise CheckpointError(
            f"the checkpoint's configuration has {shown(self.text)} where a value is expected, and only literals are "
            "read; write the value into its configuration text"
        )

    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __eq__ = _refuse
    __int__ = __float__ = __index__ = __lt__ = __gt__ = __add__ = __mul__ = _refuse
    __hash__ = object.__hash__


def read_config_text(text: str) -> dict[str, Any]:
    """Return the values that a Python configuration assigns to names.

    Literals, lists, tuples, dictionaries, `dict(...)`, names that were assigned before, signs and arithmetic of numbers
    are read. Each other expression becomes an `Unread`; other statements are left out.

    Args:
        text: the configuration.

    Raises:
        CheckpointError: the text is too long, no Python, or a trap (see `check_values`); the message is the reason.
    """
    if len(text) > LONGEST:
        raise CheckpointError(f"more than {LONGEST} characters, and no configuration")
    if text.count("{") > BRACES:
        raise CheckpointError(f"more than {BRACES} braces, and no configuration")
    try:
        values = _Reader(text).values
    except SyntaxError as error:
        raise CheckpointError(f"no Python (line {error.lineno}: {error.msg})") from None
    except (ValueError, RecursionError, MemoryError):  # a null byte; nested too deeply
        raise CheckpointError("no Python that can be read") from None
    check_values(values)
    return values


def check_values(values: Mapping[Any, Any]) -> None:
    """Check that a configuration is no trap: few letters, or few objects, can say lists of lists without end.

    Args:
        values: the configuration; lists, tuples and dictionaries may be inside.

    Raises:
        CheckpointError: it has more than `PARTS` values, is nested more than `DEEPEST` deep, or has an integer beyond
            `LARGEST`; the message is the reason.
    """
    level, parts = [values], 0
    for _ in range(DEEPEST):
        inside: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                inside += [*value, *value.values()]
            elif isinstance(value, list | tuple | set):
                inside += value
            elif isinstance(value, int) and abs(value) > LARGEST:
                raise CheckpointError(f"an integer beyond {LARGEST}, and no configuration")
            if parts + len(inside) > PARTS:
                raise CheckpointError(f"more than {PARTS} values, and no configuration")
        if not inside:
            return
        level, parts = inside, parts + len(inside)
    raise CheckpointError(f"nested more than {DEEPEST} deep, and no configuration")


class _Reader:
    """Reads the assignments of a text.

    Attributes:
        values: the values by their names.
    """

    def __init__(self, text: str):
        self.lines = text.encode().splitlines()
        self.values: dict[str, Any] = {}
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign):
                targets = statement.targets
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                targets = [statement.target]
            else:
                continue
            value = self._value(statement.value)  # type: ignore[arg-type]
            self.values.update((target.id, value) for target in targets if isinstance(target, ast.Name))

    def _unread(self, node: ast.expr) -> Unread:
        """Return an `Unread` with the first line of an expression."""
        end = node.end_col_offset if node.end_lineno == node.lineno else None
        return Unread(self.lines[node.lineno - 1][node.col_offset : end][:1000].decode("utf-8", "replace"))

    def _value(self, node: ast.expr) -> Any:
        """Return the value of an expression; an `Unread` if it is no literal."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List):
            return [self._value(part) for part in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self._value(part) for part in node.elts)
        if isinstance(node, ast.Name) and node.id in self.values:
            return self.values[node.id]
        if isinstance(node, ast.Dict):
            return self._dictionary(list(zip(node.keys, node.values, strict=True)), node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            items: list[tuple[ast.expr | None, ast.expr]] = [(None, part) for part in node.args]  # dict({'a.b': 1})
            items += [(None if k.arg is None else ast.Constant(k.arg), k.value) for k in node.keywords]
            return self._dictionary(items, node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            number = self._value(node.operand)
            if isinstance(number, int | float):
                return -number if isinstance(node.op, ast.USub) else number
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            left, right = self._value(node.left), self._value(node.right)
            if all(isinstance(each, int | float) and abs(each) <= LARGEST for each in (left, right)):
                try:
                    return OPERATIONS[type(node.op)](left, right)
                except ArithmeticError:
                    pass
        return self._unread(node)

    def _dictionary(self, items: Sequence[tuple[ast.expr | None, ast.expr]], node: ast.expr) -> Any:
        """Return a dictionary of keys and values; a key that is None stands before a dictionary to take in."""
        made: dict[Any, Any] = {}
        for key, value in items:
            if key is not None:
                name = self._value(key)
                if not isinstance(name, str | int | float):
                    return self._unread(node)
                made[name] = self._value(value)
            elif isinstance(inner := self._value(value), dict):
                made.update(inner)
            else:
                return self._unread(node)
        return made
