"""A Jinja sandbox that bounds time and memory, too: what a template reads, makes or repeats is paid from a purse.

A template may call what chat templates on model hubs call; llama.cpp's engine for them has the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sequence, Sized, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import TemplateRuntimeError, filters, nodes, pass_context, pass_eval_context
from jinja2.ext import loopcontrols
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEP_COST = 64  # of an iteration or a call
VALUE_COST = 8  # of reading a value; each of its characters or items costs 1
BASE_COST = 1 << 20  # what a template may always spend
READINGS = 64  # beside that, so many readings of the messages (templates need 3 to 40), and a step for each two of them
MAX_BITS = 4096  # of a number
MAX_INDENT = 16

_GLOBALS = ("cycler", "dict", "joiner", "namespace", "range")
_TEXT_METHODS = """capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace
    isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split
    splitlines startswith strip title upper"""
# Filters that look at the items of a value, and those that look at all that is in it.
_ITEM_FILTERS = "attr count d default first items last length list map reject rejectattr reverse select selectattr"
_WHOLE_FILTERS = "abs capitalize dictsort e escape float int lower max min safe sort string title trim unique upper"
_WHOLE_TESTS = "eq ne lt le gt ge in lower upper"

_purse: ContextVar[list[int]] = ContextVar("purse")


@contextmanager
def purse_for(messages: Sequence[Any]) -> Iterator[None]:
    """Gives what rendering these messages may cost."""
    token = _purse.set([BASE_COST + STEP_COST * len(messages) ** 2 + READINGS * sum(_costs(messages))])
    try:
        yield
    finally:
        _purse.reset(token)


def _spend(cost: int) -> None:
    purse = _purse.get()
    purse[0] -= max(0, cost)
    if purse[0] < 0:
        raise TemplateRuntimeError("it takes too much time or memory")


def _costs(value: Any) -> Iterator[int]:
    """What it costs to read a value: first itself, then all that is in it, as often as it is there."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, Namespace):
            value = value._Namespace__attrs
        yield VALUE_COST + (len(value) if isinstance(value, Sized) and not isinstance(value, Context) else 0)
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            left += value


def _read(value: Any) -> Any:
    """Pays for all that is in a value, and gives it back."""
    for cost in _costs(value):
        _spend(cost)
    return value


def _touch(value: Any) -> None:
    """Pays for the items of a value."""
    _spend(next(_costs(value)))


def _steps(items: Iterable[Any]) -> Iterator[Any]:
    """Pays for each iteration."""
    for item in items:
        _spend(STEP_COST)
        yield item


def _pay(cost: int) -> int:
    """Pays so much, in the body of a loop: also where the loop calls itself."""
    _spend(cost)
    return cost


def _metered(function: Callable[..., Any], pay: Callable[[Any], Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        _spend(STEP_COST)
        for value in (*args, *named.values()):
            pay(value)
        result = function(*args, **named)
        if isinstance(result, str | list):
            _touch(result)
        return result

    return call


def _joined(values: Iterable[Any], between: str) -> list[Any]:
    found = []
    for value in _steps(values):
        _spend(len(between))
        found.append(_read(value))
    return found


def _pay_replacing(text: str, old: str, new: str, *_: Any) -> None:
    _spend(len(text) + text.count(old) * len(new))


@pass_eval_context
def _join(context: nodes.EvalContext, values: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    return filters.do_join(context, _joined(values, str(_read(d))), d, attribute)  # type: ignore[no-any-return]


@pass_eval_context
def _replace(context: nodes.EvalContext, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    s, old, new = (str(_read(value)) for value in (s, old, new))
    _pay_replacing(s, old, new)
    return filters.do_replace(context, s, old, new, count)


def _indent(s: Any, width: int = 4, first: bool = False, blank: bool = False) -> str:
    s = str(_read(s))
    _spend(len(s) + (1 + s.count("\n")) * width)
    return filters.do_indent(s, width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise TemplateRuntimeError(f"it indents by {str(indent)[:20]}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    parts = []
    for part in encoder.iterencode(value):
        _spend(VALUE_COST + len(part))
        parts.append(part)
    return "".join(parts)


@pass_context  # which keeps it from being called while compiling
def _shown(context: Context, value: Any) -> Any:
    return _read(value)


class _Metering(NodeTransformer):
    """Puts payments where the engine compares, joins, copies and repeats by itself."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "steps")
        cost = text + (STEP_COST if node.recursive else 0)  # calling itself it does not come by `steps`
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(cost), "pay")))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:
        self.generic_visit(node)
        node.nodes = [_filtered(part, "read") for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        for side in sides:
            side.expr = _filtered(side.expr, "read")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, "read")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _filtered(node.key, "read")
        return node


def _filtered(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox for chat templates, to be used within `purse_for`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], optimized=False, finalize=_shown
        )
        tests: dict[str, Any] = dict(self.tests)
        whole = [tests[name] for name in _WHOLE_TESTS.split()]
        self.tests = tests | {name: _metered(test, _read) for name, test in tests.items() if test in whole}
        kept = {name: _metered(self.filters[name], _touch) for name in _ITEM_FILTERS.split()}
        kept |= {name: _metered(self.filters[name], _read) for name in _WHOLE_FILTERS.split()}
        kept |= {"join": _join, "replace": _replace, "indent": _indent, "tojson": _tojson}
        self.filters = kept | {"read": _read, "steps": _steps, "pay": _pay}
        self.globals = {name: self.globals[name] for name in _GLOBALS}

    def _generate(self, source: nodes.Template, *args: Any, **named: Any) -> str:
        return super()._generate(_Metering().visit(source), *args, **named)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """The sandbox's own rule; and of texts and numbers only the methods above."""
        if isinstance(obj, str | bytes | int | float):
            return isinstance(obj, str) and attr in _TEXT_METHODS.split()
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Texts are not formatted: a width may be any number."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item of a value, or an attribute."""
        return super().getitem(obj, _read(argument))

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:
        """Calls a function; what a macro is given is only handed on."""
        _spend(STEP_COST)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | list | tuple):
            _read(owner)
        for value in () if isinstance(__obj, Macro) else (*args, *named.values()):
            _read(value)
        if isinstance(owner, str) and __obj.__name__ == "join":
            args = (_joined(args[0], owner), *args[1:])
        elif isinstance(owner, str) and __obj.__name__ == "replace":
            _pay_replacing(owner, *args)
        result = super().call(__context, __obj, *args, **named)
        if isinstance(result, str | list | dict):
            _touch(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """What can make a text, a list or a number much larger."""
        if isinstance(left, int | float) and isinstance(right, int | float):
            bits = [int(number).bit_length() for number in (left, right)]
            if (bits[0] * abs(int(right)) if operator == "**" else sum(bits)) > MAX_BITS:
                raise TemplateRuntimeError("it has too large a number")
        elif operator == "*":
            several, times = (right, left) if isinstance(left, int) else (left, right)
            _spend(len(several) * max(0, times))
        elif operator == "+":
            _touch(left)
            _touch(right)
        else:
            raise TemplateRuntimeError(f"{operator} takes numbers")
        return super().call_binop(context, operator, left, right)
