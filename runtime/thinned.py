"""Compiles a module of ours for a quick start: without what a start does not use, the rest to be thawed when called.

Of a source goes what only readers and type checkers need: annotations of functions, `if TYPE_CHECKING:`, and imports
from __future__. A function that a usual command does not call (runtime/usual.json knows which do) becomes a stub with
its real code in one string of bytes: making the objects of a code takes ten times as long as copying its bytes, and
the pages they fill would be copied once more in each process that is forked from here.

Refuses to touch class bodies (Record reads its fields from there), decorated functions, closures, generators and what
the interpreter made up itself. Invariant: a call has the same effects as that of the source's function, and nothing is
read from any file for it: the code may be thawed in a process that is inside a container.
"""

from __future__ import annotations

import ast
import functools
import marshal
from types import CodeType

_CO_OPTIMIZED, _CO_NEWLOCALS = 1, 2  # a function's, and neither a module's nor a class's
THAW = "__ocirun_thaw__"  # what stubs call, in builtins: runtime/boot.py
_STUB = f"def stub(*args, **kwargs):\n    return {THAW}(b'')(*args, **kwargs)\n"


def compile_thin(source: bytes, path: str, usual: set[str] | None) -> CodeType:
    """The code object of a module, as compile() at optimization level 2 gives it, thinned. `usual`: qualified names of
    the functions that stay as they are; None for all."""
    code, plain = _compiled(source, path)
    return code if usual is None else _thin(code, usual, plain)


@functools.cache  # each command has another idea of what is usual, all of the same modules
def _compiled(source: bytes, path: str) -> tuple[CodeType, frozenset[str]]:
    """The module's code, and the functions that may become stubs."""
    tree = ast.parse(source, path)
    tree.body = [_assigned(statement) for statement in _trimmed(tree.body)]
    flags = annotations.compiler_flag  # what the import from __future__ is to the compiler
    return compile(tree, path, "exec", flags, dont_inherit=True, optimize=2), _plain_functions(tree)


def _trimmed(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements without what only readers and type checkers need; those in them likewise. Expressions, nearly all of a
    tree, hold no statement."""
    left: list[ast.stmt] = []
    for statement in body:
        for name in ("body", "orelse", "finalbody"):
            if inner := getattr(statement, name, None):
                setattr(statement, name, _trimmed(inner))
        for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            part.body = _trimmed(part.body)
        if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
            continue
        if isinstance(statement, ast.If) and _is_type_checking(statement.test):
            left += statement.orelse
            continue
        if isinstance(statement, ast.FunctionDef):
            _unannotate(statement)
        left.append(statement)
    return left


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _unannotate(node: ast.FunctionDef) -> None:
    node.returns = None
    arguments = node.args
    for argument in (
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ):
        if argument is not None:
            argument.annotation = None
    node.body = [_assigned(statement) for statement in node.body] or [ast.copy_location(ast.Pass(), node)]


def _assigned(statement: ast.stmt) -> ast.stmt:
    """`name: type = value` as `name = value`; without a value it stays, since it may make a name local."""
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return ast.copy_location(ast.Assign([statement.target], statement.value), statement)
    return statement


def _plain_functions(tree: ast.Module) -> frozenset[str]:
    """Qualified names of undecorated functions of the module and of its classes, each defined once."""
    found: list[str] = []

    def look(body: list[ast.stmt], prefix: str) -> None:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                look(statement.body, f"{prefix}{statement.name}.")
            elif isinstance(statement, ast.FunctionDef) and not statement.decorator_list:
                found.append(prefix + statement.name)

    look(tree.body, "")
    return frozenset(name for name in found if found.count(name) == 1)


def _thin(code: CodeType, usual: set[str], plain: frozenset[str]) -> CodeType:
    def thinned(constant: object) -> object:
        if not isinstance(constant, CodeType):
            return constant
        if not constant.co_flags & (_CO_OPTIMIZED | _CO_NEWLOCALS):
            return _thin(constant, usual, plain)  # a class
        if constant.co_qualname in usual or constant.co_qualname not in plain or constant.co_freevars:
            return constant
        return _stub(constant)

    return code.replace(co_consts=tuple(thinned(constant) for constant in code.co_consts))


def _stub(code: CodeType) -> CodeType:
    template = compile(_STUB, code.co_filename, "exec", dont_inherit=True, optimize=2).co_consts[0]
    assert isinstance(template, CodeType)
    frozen = marshal.dumps(code)
    consts = tuple(frozen if constant == b"" else constant for constant in template.co_consts)
    return template.replace(
        co_name=code.co_name, co_qualname=code.co_qualname, co_firstlineno=code.co_firstlineno, co_consts=consts
    )
