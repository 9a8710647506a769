"""The first code of the command `ocirun`: modules from one file instead of a search for each, then `runtime.cli.main`.

The file (runtime/install.py writes it) holds the byte code of every module that ocirun can need, with the size and
modification time of its source. Refuses nothing: a module whose source has changed since, or that is not in the file,
is imported in the ordinary way. Invariant: what runs is what the sources say; only how it is found is quicker.

    file: length of the index in decimal digits, the index, code objects; all but the first marshalled (marshal)
    index: modules {name: (offset, length, is package, path, mtime in ns, size)}, and
           groups {command: chunks (names, offset, length), each a tuple of code objects in the order of execution}

Code of a group is thinned for its command (runtime/thinned.py); `thaw` is what its stubs call.

Runs before anything else is imported, so it is written with what every interpreter has at its start.
"""

import gc
import sys

gc.disable()  # one command is over in milliseconds

import builtins  # noqa: E402
import marshal  # noqa: E402
import posix  # noqa: E402  (os is one of the modules that come out of the file)

# _frozen_importlib is importlib._bootstrap, without the 2 ms of the package importlib.
from _frozen_importlib import ModuleSpec  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType, FunctionType, ModuleType
    from typing import Any, NoReturn
else:
    ModuleType, FunctionType = type(sys), type(lambda: None)
    CodeType = Any = NoReturn = None

HEADER = 16  # the length of the index in decimal digits


class Bundle:
    """The file: a finder and loader for sys.meta_path (importlib.abc, without that module), and `preload`."""

    def __init__(self, path: str) -> None:
        self._path = path
        fd = self._open()
        try:
            length = int(posix.read(fd, HEADER))
            self._modules, self._groups = marshal.loads(posix.read(fd, length))
        finally:
            posix.close(fd)
        self._start = HEADER + length

    def _open(self) -> int:
        # Anew each time: an fd that is kept could be one of those that --preserve-fds passes on.
        return posix.open(self._path, posix.O_RDONLY | posix.O_CLOEXEC)

    def _load(self, fd: int, offset: int, length: int) -> Any:
        return marshal.loads(posix.pread(fd, length, self._start + offset))

    def _is_current(self, source: str, mtime_ns: int, size: int) -> bool:
        try:
            status = posix.stat(source)
        except OSError:
            return False
        return status.st_mtime_ns == mtime_ns and status.st_size == size

    def preload(self, words: list[str]) -> None:
        """Imports what the first of `words` that is the name of a command is known to need, without the machinery's
        locks, specs and look-ups for each module. A wrong guess costs time, nothing else."""
        for word in words:
            if word in self._groups:
                break
        else:
            return
        modules = sys.modules
        fd = self._open()
        try:
            for names, offset, length in self._groups[word]:
                for name, code in zip(names, self._load(fd, offset, length)):  # noqa: B905
                    parent = name.rpartition(".")[0]
                    if name in modules or (parent and parent not in modules):
                        continue
                    if self._is_current(*self._modules[name][3:]):
                        self._execute(name, parent, code)
        finally:
            posix.close(fd)

    def _execute(self, name: str, parent: str, code: CodeType) -> None:
        module = sys.modules[name] = ModuleType(name)
        place = module.__dict__
        _, _, is_package, source, _, _ = self._modules[name]
        place["__file__"] = source
        place["__package__"] = name if is_package else parent
        if is_package:
            place["__path__"] = [source.rpartition("/")[0]]
        exec(code, place)  # noqa: S102
        if parent:
            setattr(sys.modules[parent], name.rpartition(".")[2], module)

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """As importlib.abc.MetaPathFinder has it; None: another finder may know."""
        entry = self._modules.get(name)
        if entry is None or not self._is_current(*entry[3:]):
            return None
        _, _, is_package, source, _, _ = entry
        spec: Any = ModuleSpec(name, self, origin=source, is_package=is_package)  # type: ignore[arg-type]
        spec.has_location = True  # gives the module its __file__
        if is_package:
            spec.submodule_search_locations.append(source.rpartition("/")[0])
        return spec

    def create_module(self, _spec: object) -> None:
        """As importlib.abc.Loader has it; None: a module as usual."""

    def exec_module(self, module: ModuleType) -> None:
        """As importlib.abc.Loader has it."""
        fd = self._open()
        try:
            code = self._load(fd, *self._modules[module.__name__][:2])
        finally:
            posix.close(fd)
        exec(code, module.__dict__)  # noqa: S102


def thaw(frozen: bytes) -> FunctionType:
    """The function whose stub calls this, with its own code from here on. Reads nothing but memory."""
    stub = sys._getframe(1).f_code
    code = marshal.loads(frozen)
    for found in gc.get_referrers(stub):
        if type(found) is FunctionType and found.__code__ is stub:
            found.__code__ = code
            return found
    raise SystemError(f"no function has the code of {stub.co_qualname}")


def main(tree: str, bundle: str) -> NoReturn:
    """Never returns: taking the interpreter apart at the end would be a tenth of a command's time, and whatever a
    command writes it writes unbuffered."""
    sys.path.append(tree)
    try:
        modules = Bundle(bundle)
    except (OSError, ValueError, EOFError, TypeError):
        pass  # none there, or of another Python: the ordinary way
    else:
        sys.meta_path.insert(0, modules)  # type: ignore[arg-type]
        setattr(builtins, "__ocirun_thaw__", thaw)  # noqa: B010
        from runtime import lean_os

        lean_os.install()
        modules.preload(sys.argv[1:])
    from runtime.cli import main as ocirun

    posix._exit(ocirun())
