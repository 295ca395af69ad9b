"""Small wrong versions of a Python source: every operator of benchmarks.mutation_operators at every node that it fits.

What is no mathematics is left alone: docstrings, type annotations, imports, strings and the arguments of a `raise`.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.mutation_operators import OPERATORS, Site, called

_OPERATIONS = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp)


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Args:
        file: path from the root, for example "losses/dpo.py".
        function: qualified name of what holds the change, "<module>" outside of functions.
        operator: its name in `OPERATORS`.
        line: first line of the change.
        original: the changed lines, white space squeezed.
        mutated: what stands there instead.
        source: the whole changed file.
    """

    file: str
    function: str
    operator: str
    line: int
    original: str
    mutated: str
    source: str = field(repr=False)


def generate(file: str, source: str) -> list[Mutant]:
    """Every mutant of a source that compiles and differs from it and from all others, in the order of the source."""
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    for node, site in _sites(tree):
        for name, operator in OPERATORS.items():
            for replacement in operator(node, site):
                mutant = _apply(file, source, node, site, name, replacement)
                if mutant.source != source and mutant.source not in found and _compiles(mutant.source):
                    found[mutant.source] = mutant
    return list(found.values())


def _sites(tree: ast.Module) -> Iterator[tuple[ast.AST, Site]]:
    """The nodes that are open to change, in the order of the source."""
    module_names = frozenset(_bound(tree.body))

    def visit(node: ast.AST, site: Site) -> Iterator[tuple[ast.AST, Site]]:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr | ast.arg) or _is_typing(node) or _is_text(node):
            return
        yield node, site
        if isinstance(node, ast.Raise):
            return
        below = Site((*site.parents, node), site.function, site.names)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            prefix = "" if site.function == "<module>" else f"{site.function}."
            arguments = {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
            below = Site(below.parents, prefix + node.name, site.names | arguments | set(_bound(node.body)))
            decorators = [call for call in node.decorator_list if isinstance(call, ast.Call) and called(call) == "register"]
            defaults = [node.args] if isinstance(node, ast.FunctionDef) else []
            children: list[ast.AST] = [*decorators, *defaults, *node.body]
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        else:
            children = list(ast.iter_child_nodes(node))
        for child in children:
            yield from visit(child, below)

    root = Site((tree,), "<module>", module_names)
    for statement in tree.body:
        yield from visit(statement, root)


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Names that statements assign, define or import."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias):
                yield getattr(node, "asname", None) or node.name


def _apply(file: str, source: str, node: ast.AST, site: Site, operator: str, replacement: ast.AST) -> Mutant:
    """Puts the replacement in the node's place, so that all other lines stay what and where they were."""
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(replacement)))
    assert isinstance(node, ast.stmt | ast.expr)
    assert node.end_lineno is not None
    lines = source.splitlines(keepends=True)
    old = lines[node.lineno - 1 : node.end_lineno]
    # Columns of the tree count bytes.
    head = old[0].encode()[: node.col_offset].decode()
    tail = old[-1].encode()[node.end_col_offset :].decode()
    is_enclosed = head.endswith("(") and tail.startswith(")")
    if isinstance(replacement, _OPERATIONS) and _binds_tighter(site.parent, node, replacement) and not is_enclosed:
        text = f"({text})"
    new = head + text + tail
    after = "".join([*lines[: node.lineno - 1], new, *lines[node.end_lineno :]])
    for name in ("masked_sum", "masked_mean"):
        if isinstance(replacement, ast.Call) and called(replacement) == name and name not in site.names:
            after += f"\nfrom losses.ops import {name}\n"
    return Mutant(file, site.function, operator, node.lineno, _squeezed("".join(old)), _squeezed(new), after)


def _binds_tighter(parent: ast.AST, node: ast.AST, replacement: ast.AST) -> bool:
    """Whether an operation needs parentheses in this node's place."""
    if _rank(replacement) >= _rank(node) > 0:
        return False
    if isinstance(parent, ast.Call | ast.Subscript | ast.Attribute):
        return node is getattr(parent, "func", None) or node is getattr(parent, "value", None)
    if isinstance(parent, ast.IfExp):
        return isinstance(replacement, ast.IfExp)
    return isinstance(parent, _OPERATIONS)


def _rank(node: ast.AST) -> int:
    """How tightly comparisons and arithmetic bind; 0 for all else."""
    if isinstance(node, ast.BinOp):
        return {ast.Add: 2, ast.Sub: 2, ast.Mult: 3, ast.Div: 3}.get(type(node.op), 0)
    return 1 if isinstance(node, ast.Compare) else 0


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
