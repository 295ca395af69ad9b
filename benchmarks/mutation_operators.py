"""The slips that loss mathematics invites, as operators: each looks at a node of a syntax tree and yields what may replace it.

What would be the same program is not made: an axis -1 has no positive twin, functions whose arguments commute keep their order,
and `ones_like` keeps the tensor whose shape it takes.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Node = TypeVar("Node", bound=ast.AST)


@dataclass(frozen=True)
class Site:
    """Where a node stands: `parents` from the module down to its own, `names` all that are bound there."""

    parents: tuple[ast.AST, ...]
    function: str
    names: frozenset[str]

    @property
    def parent(self) -> ast.AST:
        return self.parents[-1]


Operator = Callable[[ast.AST, Site], Iterator[ast.AST]]

_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt,), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt,),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
}  # fmt: skip
# Functions and methods of torch by what might be written for them.
_CALLS = {
    "sum": ("mean",), "mean": ("sum",), "max": ("min",), "min": ("max",), "amax": ("amin",), "amin": ("amax",),
    "maximum": ("minimum",), "minimum": ("maximum",), "argmax": ("argmin",), "argmin": ("argmax",),
    "any": ("all",), "all": ("any",), "exp": ("log", "expm1"), "log": ("exp", "log1p"), "expm1": ("exp",), "log1p": ("log",),
    "softplus": ("logsigmoid",), "logsigmoid": ("softplus",), "softmax": ("log_softmax",), "log_softmax": ("softmax",),
    "rsqrt": ("sqrt",), "square": ("abs",), "abs": ("square",), "logsumexp": ("sum",), "logcumsumexp": ("cumsum",),
    "masked_sum": ("masked_mean",), "masked_mean": ("masked_sum",),
}  # fmt: skip
_UNDONE = {"sigmoid": "log", "logsigmoid": "exp"}
_CLAMPS = {"clamp", "clip", "clamp_min", "clamp_max", "relu"}
_ALONG_AXIS = {
    "sum", "mean", "max", "min", "amax", "amin", "any", "all", "argmax", "argmin", "argsort", "sort", "size", "flip", "gather",
    "softmax", "log_softmax", "logsumexp", "cumsum", "logcumsumexp", "cat", "stack", "unsqueeze", "squeeze", "flatten",
}  # fmt: skip
_MODULES = {"torch", "F", "math"}
# Exchanging their arguments changes nothing, or nothing that is mathematics.
_SYMMETRIC = {"maximum", "minimum", "max", "min", "logaddexp", "equal", "isinstance", "getattr", "setattr", "hasattr"}
_TWINS = {
    "chosen_rejected": (("chosen", "rejected"),),
    "policy_reference": (("policy", "reference"), ("policy", "old")),
}


def sign(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """a+b <-> a-b, a*b <-> a/b, -a -> a."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC and not _joins_text(node):
        yield _with(node, op=_ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not _is_axis(node, site):
        yield node.operand


def comparison(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """< <-> <=, > <-> >=, < <-> >, == <-> !=."""
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            for other in _COMPARISONS.get(type(op), ()):
                yield _with(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])


def constant(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """A number c becomes c+1, 0 or 1, a boolean its opposite; defaults are numbers like others."""
    if isinstance(site.parent, ast.UnaryOp) and isinstance(site.parent.op, ast.USub):
        return
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    number = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if not isinstance(number, ast.Constant) or not isinstance(number.value, bool | int | float):
        return
    if isinstance(number.value, bool):
        yield ast.Constant(not number.value)
        return
    value = -number.value if negative else number.value
    for other in dict.fromkeys([value + 1] if _is_axis(node, site) else [value + 1, type(value)(0), type(value)(1)]):
        if other != value:
            yield ast.Constant(other) if other >= 0 else ast.UnaryOp(ast.USub(), ast.Constant(-other))


def swapped_arguments(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """Two neighbouring positional arguments exchanged."""
    if isinstance(node, ast.Call) and called(node) not in _SYMMETRIC:
        for index, (left, right) in enumerate(zip(node.args, node.args[1:], strict=False)):
            # A condition in the place of a value is an error of types in every case.
            if (
                not isinstance(left, ast.Starred)
                and not isinstance(right, ast.Starred)
                and (called(node), index) != ("where", 0)
            ):
                yield _with(node, args=[*node.args[:index], right, left, *node.args[index + 2 :]])


def dropped_detach(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """x.detach() -> x."""
    if isinstance(node, ast.Call) and called(node) == "detach":
        yield _subject(node)


def dropped_mask(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """Masked reductions, products with a mask, `where` and `masked_fill` without it; a mask handed on becomes ones."""
    if isinstance(node, ast.Call):
        name = called(node)
        if name in ("masked_sum", "masked_mean") and len(node.args) > 1:
            plain = ast.Attribute(node.args[0], name.removeprefix("masked_"))
            yield ast.Call(plain, node.args[2:], node.keywords)
        elif name == "where" and len(node.args) > 1:
            yield node.args[1] if _is_module(node.func) else _subject(node)
        elif name == "masked_fill":
            yield _subject(node)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        if _is_mask(node.right):
            yield node.left
        if _is_mask(node.left):
            yield node.right
    elif isinstance(node, ast.Name) and _is_mask(node) and not _has_own_form(site):
        yield ast.Call(ast.Attribute(node, "new_ones"), [ast.Attribute(node, "shape")], [])


def other_function(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """Mean for sum, minimum for maximum, expm1 for exp, log-sigmoid for softplus, and so on."""
    if not isinstance(node, ast.Call):
        return
    name = called(node)
    # Of plain functions, those that surely have a twin of the same signature; of methods and torch's functions, all.
    if isinstance(node.func, ast.Attribute) or name in ("max", "min", "masked_sum", "masked_mean"):
        for other in _CALLS.get(name, ()):
            yield _with(node, func=_renamed(node.func, other))
    if name in _UNDONE:
        yield ast.Call(ast.Attribute(node, _UNDONE[name]), [], [])
    if name in ("clamp", "clip") and [keyword.arg for keyword in node.keywords] in (["min"], ["max"]):
        opposite = {"min": "max", "max": "min"}[str(node.keywords[0].arg)]
        yield _with(node, keywords=[ast.keyword(opposite, node.keywords[0].value)])


def dropped_clamp(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """x.clamp(...), x.clip(...) and relu(x) -> x."""
    if isinstance(node, ast.Call) and called(node) in _CLAMPS:
        yield _subject(node)


def chosen_rejected(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """One name of a side replaced by the other side's, or all of an expression exchanged."""
    yield from _twins(node, site, "chosen_rejected")


def policy_reference(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """One name of the policy replaced by the reference's (or the old policy's), or all of an expression exchanged."""
    yield from _twins(node, site, "policy_reference")


def dropped_term(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """a+b -> a and b; a-b -> a and -b."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and not _joins_text(node):
        yield node.left
        yield node.right if isinstance(node.op, ast.Add) else ast.UnaryOp(ast.USub(), node.right)


def negated_condition(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """`if x` -> `if not x`, in statements, expressions, loops and comprehensions."""
    parent = site.parent
    is_test = isinstance(parent, ast.If | ast.IfExp | ast.While) and node is parent.test
    if isinstance(node, ast.expr) and (is_test or (isinstance(parent, ast.comprehension) and node in parent.ifs)):
        yield node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else ast.UnaryOp(ast.Not(), node)


def removed_raise(node: ast.AST, site: Site) -> Iterator[ast.AST]:
    """`raise ...` -> `pass`."""
    if isinstance(node, ast.Raise):
        yield ast.Pass()


OPERATORS: dict[str, Operator] = {
    operator.__name__: operator
    for operator in (
        sign, comparison, constant, swapped_arguments, dropped_detach, dropped_mask, other_function, dropped_clamp,
        chosen_rejected, policy_reference, dropped_term, negated_condition, removed_raise,
    )
}  # fmt: skip


def _twins(node: ast.AST, site: Site, operator: str) -> Iterator[ast.AST]:
    def twin(name: str) -> str | None:
        for left, right in _TWINS[operator]:
            for one, other in ((left, right), (right, left)):
                if one in name.split("_") and (swapped := name.replace(one, other)) in site.names:
                    return swapped
        return None

    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and not _gives_shape(site) and (other := twin(node.id)):
        yield ast.Name(other, ast.Load())
    # Whole expressions of statements; in a condition both sides are asked alike.
    if isinstance(node, ast.expr) and isinstance(
        site.parent, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr
    ):
        names = [name for name in ast.walk(node) if isinstance(name, ast.Name) and twin(name.id)]
        if len({name.id for name in names}) > 1 and all(isinstance(name.ctx, ast.Load) for name in names):
            exchanged = copy.deepcopy(node)
            for name in ast.walk(exchanged):
                if isinstance(name, ast.Name):
                    name.id = twin(name.id) or name.id
            yield exchanged


def _is_mask(node: ast.AST) -> bool:
    """A name of a mask, or a cast, inversion or view of one."""
    match node:
        case ast.Name(id=name):
            return re.fullmatch(r"(\w+_)?mask|kept", name) is not None
        case ast.Call(func=ast.Attribute(value=inner)) | ast.Subscript(value=inner) | ast.UnaryOp(operand=inner):
            return _is_mask(inner)
        case _:
            return False


def _has_own_form(site: Site) -> bool:
    """Whether this use of a mask is dropped as a whole (or is none: a question about its shape, or whether it is None)."""
    inner = [parent for parent in site.parents if isinstance(parent, ast.expr)]
    if inner and isinstance(inner[-1], ast.Attribute) and inner[-1].attr in ("shape", "dtype", "device", "ndim", "new_ones"):
        return True
    for parent in reversed(inner):
        if isinstance(parent, ast.Compare) or (isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Invert)):
            return True
        if isinstance(parent, ast.BinOp):
            return isinstance(parent.op, ast.Mult) and (_is_mask(parent.left) or _is_mask(parent.right))
        if isinstance(parent, ast.Call) and not _is_mask(parent):
            return called(parent) in ("masked_sum", "masked_mean", "where", "masked_fill")
    return False


def _is_axis(node: ast.AST, site: Site) -> bool:
    """Whether a negative number counts dimensions from the end."""
    parent = site.parent
    if not isinstance(node, ast.UnaryOp):
        return False
    if isinstance(parent, ast.keyword):
        return parent.arg in ("dim", "axis")
    if isinstance(parent, ast.Call):
        return called(parent) in _ALONG_AXIS
    return isinstance(parent, ast.Subscript | ast.Slice)


def _gives_shape(site: Site) -> bool:
    """Whether `ones_like` and its kin read the shape of what stands here, or of a part of it, and nothing else."""
    outer = next(parent for parent in reversed(site.parents) if not isinstance(parent, ast.Subscript))
    return isinstance(outer, ast.Call) and called(outer) in ("ones_like", "zeros_like", "empty_like", "full_like")


def _joins_text(node: ast.AST) -> bool:
    """Whether a string stands among the terms: the sum is a text."""
    return any(
        isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str) for part in ast.iter_child_nodes(node)
    )


def _is_module(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id in _MODULES


def called(call: ast.Call) -> str:
    """The last name of what is called, "" where it has none."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _subject(call: ast.Call) -> ast.expr:
    """What a function of torch or a method works on."""
    return call.args[0] if _is_module(call.func) or isinstance(call.func, ast.Name) else call.func.value  # type: ignore[attr-defined]


def _renamed(function: ast.expr, name: str) -> ast.expr:
    return _with(function, attr=name) if isinstance(function, ast.Attribute) else ast.Name(name, ast.Load())


def _with(node: Node, **changes: object) -> Node:
    """A shallow copy with other fields."""
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
