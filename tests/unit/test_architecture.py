"""Arrows between the packages point one way, and nothing dangerous is used in production code. Read from the syntax
trees alone: nothing is imported here."""

from __future__ import annotations

import ast
import functools
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("cri", "imagestore", "snapshotter", "runtime", "conformance")
# Of the standard library, but not yet in 3.11, where another name is tried first or next.
SINCE_3_12 = {"_sha2"}
COMPONENTS = ("imagestore", "snapshotter", "runtime")


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str
    target: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.module} → {self.target}"


def _module(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            if not file.stem.endswith(("_pb2", "_pb2_grpc")):
                yield file


@functools.cache
def tree(file: Path) -> ast.Module:
    # Without the collector, which would look through all trees so far again and again: half of the time.
    gc.disable()
    try:
        return ast.parse(file.read_text(), str(file))
    finally:
        gc.enable()


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # no statement is inside of one
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            # Seen by mypy only. It is still an arrow between packages, but it costs nothing at run time.
            yield from _walk(child, True)
        else:
            yield from _walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@functools.cache
def imports() -> tuple[Import, ...]:
    found = []
    for file in sources():
        module = _module(file)
        package = module if file.stem == "__init__" else module.rpartition(".")[0]
        for node, lazy in _walk(tree(file), False):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = node.module or ""
                if node.level:
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parents, base] if base else parents)
                # `from a.b import c` may mean the module a.b.c.
                names = [f"{base}.{alias.name}" for alias in node.names]
                targets = [name if name.split(".")[0] in PACKAGES and _exists(name) else base for name in names]
            found += [Import(file, node.lineno, module, target, lazy) for target in dict.fromkeys(targets)]
    gc.freeze()  # nor in later tests: a million nodes stay
    return tuple(found)


def _inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _refused(why: str, edges: list[Import]) -> None:
    assert not edges, f"{why}:\n  " + "\n  ".join(map(str, edges))


def test_nothing_imports_cri() -> None:
    edges = [
        edge
        for edge in imports()
        # conformance drives sockets from outside: it may have the wire format, and nothing behind it.
        if _inside(edge.target, "cri")
        and not _inside(edge.module, "cri")
        and not (_inside(edge.module, "conformance") and _inside(edge.target, "cri.api"))
    ]
    _refused("cri is the top: the components know nothing of CRI, so that others can use them", edges)


def test_components_do_not_import_one_another() -> None:
    edges = [
        edge
        for edge in imports()
        for mine in COMPONENTS
        for other in COMPONENTS
        if mine != other
        and _inside(edge.module, mine)
        and _inside(edge.target, other)
        and not _inside(edge.target, "runtime.linux")
    ]
    _refused("imagestore, snapshotter and runtime are replaceable one by one; only runtime.linux is for all", edges)


def test_conformance_looks_from_outside() -> None:
    edges = [
        edge
        for edge in imports()
        if _inside(edge.module, "conformance")
        and _inside(edge.target, *PACKAGES)
        and not _inside(edge.target, "conformance", "cri.api", "snapshotter", "runtime.linux")
    ]
    _refused("conformance drives sockets and binaries, as it does with the peers", edges)


def test_runtime_linux_is_a_leaf() -> None:
    edges = [
        edge
        for edge in imports()
        if _inside(edge.module, "runtime.linux")
        and _inside(edge.target, *PACKAGES)
        and not _inside(edge.target, "runtime.linux")
    ]
    _refused("runtime.linux talks to the kernel and knows nobody", edges)


def test_network_uses_the_leaf_and_its_own_package() -> None:
    allowed = ("cri.network", "cri.interfaces", "cri.errors", "cri.threads", "cri.trace", "runtime.linux")
    edges = [
        edge
        for edge in imports()
        if _inside(edge.module, "cri.network")
        and _inside(edge.target, *PACKAGES)
        and not _inside(edge.target, *allowed)
        and edge.target != "cri"
    ]
    _refused("cri.network is a part like the others: it gets what it needs handed in", edges)


def test_interfaces_know_value_types_only() -> None:
    models = ("imagestore.model", "snapshotter.model", "runtime.shim.model")
    allowed = (*models, "runtime.linux.mount", "runtime.linux.dataclass")
    edges = [
        edge
        for edge in imports()
        if edge.module == "cri.interfaces" and _inside(edge.target, *PACKAGES) and not _inside(edge.target, *allowed)
    ]
    _refused("cri.interfaces is the contract: values in, values out", edges)


def test_only_the_daemon_and_the_cli_build_parts() -> None:
    # A part's own package may know it; the command line stands in for the daemon where none serves.
    parts = {
        "imagestore.store": "imagestore",
        "snapshotter.overlay": "snapshotter",
        "runtime.shim.client": "runtime",
        "cri.network.cni": "cri.network",
    }
    edges = [
        edge
        for edge in imports()
        if edge.target in parts and not _inside(edge.module, "cri.daemon", "cri.cli", "conformance", parts[edge.target])
    ]
    _refused("only cri.daemon constructs parts; everything else receives Protocols", edges)


def test_runtime_is_standard_library_only() -> None:
    edges = [
        edge
        for edge in imports()
        if _inside(edge.module, "runtime")
        and not _inside(edge.target, "runtime")
        and edge.target.split(".")[0] not in sys.stdlib_module_names | SINCE_3_12
    ]
    _refused("the zygote and the shims stay small: runtime imports nothing outside the standard library", edges)


def test_ctypes_only_in_the_leaf() -> None:
    edges = [
        edge
        for edge in imports()
        if _inside(edge.target, "ctypes", "_ctypes") and not _inside(edge.module, "runtime.linux")
    ]
    _refused("one leaf talks to the kernel", edges)


def test_async_only_above() -> None:
    below = [
        edge for edge in imports() if _inside(edge.target, "asyncio") and _inside(edge.module, "runtime", "snapshotter")
    ]
    _refused("snapshotter, runtime and shim are plain functions", below)


DANGEROUS = {
    "shutil.rmtree": "descends into live mounts and races with links: use runtime.linux.files.remove_tree",
    "os.system": "a shell reads what came from outside: pass a list of arguments",
    "os.popen": "a shell reads what came from outside: pass a list of arguments",
    "pickle.loads": "runs what it reads (threats P9)",
    "eval": "runs what it reads",
    "exec": "runs what it reads",
}
DANGEROUS_MODULES = {
    "tarfile": "its filters were bypassed again and again (threats P1): use snapshotter.tar",
    "urllib.request": "forwards Authorization to other hosts (threats P2): use imagestore.registry",
    "pickle": "runs what it reads",
    "requests": "not a dependency",
}
# Module and call: what the start of ocirun runs is what python -m runtime.install compiled of our own sources; what an
# __init__ is compiled from are the names of a class's fields.
ALLOWED = {("runtime.boot", "exec"), ("runtime.linux.dataclass", "exec")}
PRODUCTION = ("cri", *COMPONENTS)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def test_p01_p02_dangerous_calls_are_not_in_production_code() -> None:
    found = [f"{edge}: {DANGEROUS_MODULES[edge.target]}" for edge in imports()
             if edge.target in DANGEROUS_MODULES and _inside(edge.module, *PRODUCTION)]  # fmt: skip
    for file in sources():
        if not _inside(_module(file), *PRODUCTION):
            continue
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.Call):
                continue
            name = _dotted(node.func)
            where = f"{file.relative_to(ROOT)}:{node.lineno}"
            if name in DANGEROUS and (_module(file), name) not in ALLOWED:
                found.append(f"{where}: {name}: {DANGEROUS[name]}")
            if any(word.arg == "shell" and not _is_false(word.value) for word in node.keywords):
                found.append(f"{where}: shell=True: pass a list of arguments")
    assert not found, "\n  ".join(["refused in production code:", *found])


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


HEAVY = ("rich", "yaml", "grpc", "aiohttp", "cryptography", "opentelemetry", "prometheus_client", "pyroute2")


def test_the_command_line_imports_heavy_things_where_it_uses_them() -> None:
    edges = [
        edge
        for edge in imports()
        if not edge.lazy and _inside(edge.module, "cri.cli.main", "cri.cli") and edge.target.split(".")[0] in HEAVY
        and edge.module in ("cri.cli", "cri.cli.main")
    ]  # fmt: skip
    _refused("`ocid --help` and shell completion must not wait for these", edges)


def test_traces_are_imported_only_when_enabled() -> None:
    edges = [edge for edge in imports() if not edge.lazy and _inside(edge.target, "opentelemetry")]
    _refused("opentelemetry costs 20 MiB and is off by default", edges)


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(file.relative_to(ROOT))
        for file in sources()
        if file.stat().st_size > 0 and not ast.get_docstring(tree(file))
    ]
    assert not silent, f"these begin without saying what they do and what they refuse: {silent}"
