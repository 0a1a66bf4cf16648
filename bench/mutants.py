"""Small mistakes, one at a time, in the source of a module: what its tests are there to notice.

The usual operators: a comparison, a calculation, a condition is another one, a number is one more, a
statement is left out, nothing is returned, an exception is not caught. Texts, type annotations and decorators
stay as they are. Nothing is written to disk: a mutant is code to run. Pure; used by `prove_core`.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip
_KEPT = {"annotation", "returns", "decorator_list"}


@dataclass(frozen=True)
class Mutant:
    """A module with one mistake: the `lines` of the statement it is in, and what stands there now."""

    module: str
    lines: range
    change: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.module}:{self.lines.start}: {self.change}"


def leave_unchanged(module: str, source: str) -> Mutant:
    """Returns the module at a path without a mistake."""
    return Mutant(module, range(0), "unchanged", compile(source, module, "exec"))


def draw_mutants(module: str, source: str) -> list[Mutant]:
    """Returns every mutant of the module at a path, in the order of its lines."""
    tree = ast.parse(source)
    return [mutant for statement in tree.body for mutant in _mutate(module, tree, statement, statement)]


def _mutate(module: str, tree: ast.Module, statement: ast.stmt, node: ast.AST) -> Iterator[Mutant]:
    for field, value in ast.iter_fields(node):
        if field in _KEPT:
            continue
        children = value if isinstance(value, list) else [value]
        for place, child in enumerate(children):
            if not isinstance(child, ast.AST):
                continue
            inner = child if isinstance(child, ast.stmt) else statement
            before = _say(inner)
            for other in _alternatives(child, field):
                _put(node, field, place, other)
                after = _say(other if child is inner else inner)
                code = compile(ast.fix_missing_locations(tree), module, "exec")
                yield Mutant(module, _lines(inner, child), f"{before}  =>  {after}", code)
                _put(node, field, place, child)
            yield from _mutate(module, tree, inner, child)


def _put(node: ast.AST, field: str, place: int, child: ast.AST) -> None:
    held = getattr(node, field)
    if isinstance(held, list):
        held[place] = child
    else:
        setattr(node, field, child)


def _alternatives(node: ast.AST, field: str) -> Iterator[ast.AST]:
    if type(node) in _SWAPPED:
        yield _SWAPPED[type(node)]()
    match node:
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case (
            ast.Expr(value=ast.Call() | ast.Await())
            | ast.AugAssign()
            | ast.Raise()
            | ast.Delete()
            | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
        ):
            yield ast.copy_location(ast.Pass(), node)
        case ast.Return(value=ast.expr()) if not _is_none(node.value):
            yield ast.copy_location(ast.Return(ast.Constant(None)), node)
        case ast.ExceptHandler(type=ast.expr()):
            yield ast.copy_location(ast.ExceptHandler(ast.Tuple([], ast.Load()), node.name, node.body), node)
    if field in {"test", "ifs"} and isinstance(node, ast.expr) and not isinstance(node, ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)


def _is_none(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _lines(statement: ast.stmt, node: ast.AST) -> range:
    """Returns the lines that run when the mutant does: those before the body, where there is one."""
    holder = node if isinstance(node, ast.ExceptHandler) else statement
    body = getattr(holder, "body", None)
    return range(holder.lineno, max(body[0].lineno if body else holder.end_lineno + 1, holder.lineno + 1))


def _say(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]
