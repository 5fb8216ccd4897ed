"""Reads the text of a Python configuration of mmengine or mmcv: its assignments of literals. Nothing is evaluated.

`Config.pretty_text` writes such texts into checkpoints: `model = dict(type='EncoderDecoder', backbone=dict(...))`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from fastuper.io.messages import shown
from fastuper.weights.errors import CheckpointError

LONGEST = 4 * 2**20
"""The longest text that is read, in characters."""

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
        text: the expression.
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
        CheckpointError: the text is too long, or no Python; the message begins with the reason.
    """
    if len(text) > LONGEST:
        raise CheckpointError(f"more than {LONGEST} characters, and no configuration")
    try:
        statements = ast.parse(text).body
        values: dict[str, Any] = {}
        for statement in statements:
            if isinstance(statement, ast.Assign):
                targets = statement.targets
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                targets = [statement.target]
            else:
                continue
            value = _value(statement.value, values)  # type: ignore[arg-type]
            values.update((target.id, value) for target in targets if isinstance(target, ast.Name))
    except SyntaxError as error:
        raise CheckpointError(f"no Python (line {error.lineno}: {error.msg})") from None
    except (ValueError, RecursionError, MemoryError):  # a null byte; nested too deeply
        raise CheckpointError("no Python that can be read") from None
    return values


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return the value of an expression; an `Unread` if it is no literal."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List):
        return [_value(part, names) for part in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(part, names) for part in node.elts)
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Dict):
        return _items([(key, value) for key, value in zip(node.keys, node.values, strict=True)], node, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and len(node.args) < 2:
        items: list[tuple[Any, ast.expr]] = [(None, part) for part in node.args]  # names with dots: dict({'a.b': 1})
        items += [(k.arg if k.arg is None else ast.Constant(k.arg), k.value) for k in node.keywords]
        return _items(items, node, names)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _value(node.operand, names)
        if isinstance(number, int | float):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = _value(node.left, names), _value(node.right, names)
        if isinstance(left, int | float) and isinstance(right, int | float):
            try:
                return OPERATIONS[type(node.op)](left, right)
            except ArithmeticError:
                pass
    return Unread(ast.unparse(node))


def _items(items: list[tuple[Any, ast.expr]], node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return a dictionary of keys and values; a key that is None stands before a dictionary to take in."""
    made: dict[Any, Any] = {}
    for key, value in items:
        if key is not None:
            name = _value(key, names)
            if not isinstance(name, str | int | float):
                return Unread(ast.unparse(node))
            made[name] = _value(value, names)
        elif isinstance(inner := _value(value, names), dict):
            made.update(inner)
        else:
            return Unread(ast.unparse(node))
    return made
