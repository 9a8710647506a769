"""What this leaf uses of ctypes, straight from `_ctypes`, the part of it that is in C.

`import ctypes` defines every type and loads libraries for uses that are none of ours: a fifth of the instructions of
`ocirun run true`. Names and behaviour are those of ctypes, and objects of both can be mixed: they are of the same C
types. Refuses to be complete. Invariant: on an interpreter whose `_ctypes` is another, ctypes itself stands in.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ctypes import (
        CDLL,
        POINTER,
        Array,
        Structure,
        addressof,
        c_char,
        c_char_p,
        c_int,
        c_int16,
        c_int64,
        c_long,
        c_size_t,
        c_ubyte,
        c_uint,
        c_uint32,
        c_uint64,
        c_ulong,
        c_void_p,
        create_string_buffer,
        get_errno,
        pythonapi,
    )

    def function_at(address: int) -> Callable[..., int]: ...

    def locked_function_at(address: int) -> Callable[..., int]: ...

    def callback(function: Callable[[], int]) -> Structure: ...

    def symbol_address(library: CDLL, name: str) -> int: ...

else:
    try:
        from _ctypes import (
            FUNCFLAG_CDECL,
            FUNCFLAG_PYTHONAPI,
            FUNCFLAG_USE_ERRNO,
            POINTER,
            Array,
            CFuncPtr,
            Structure,
            _SimpleCData,
            addressof,
            dlopen,
            get_errno,
        )

        class c_int(_SimpleCData):
            _type_ = "i"

        class c_uint(_SimpleCData):
            _type_ = "I"

        class c_ubyte(_SimpleCData):
            _type_ = "B"

        class c_int16(_SimpleCData):
            _type_ = "h"

        class c_int64(_SimpleCData):
            _type_ = "q"

        class c_uint64(_SimpleCData):
            _type_ = "Q"

        class c_long(_SimpleCData):
            _type_ = "l"

        class c_ulong(_SimpleCData):
            _type_ = "L"

        class c_char(_SimpleCData):
            _type_ = "c"

        class c_char_p(_SimpleCData):
            _type_ = "z"

        class c_void_p(_SimpleCData):
            _type_ = "P"

        c_size_t, c_uint32 = c_ulong, c_uint  # on every Linux (LP64 and ILP32)

        class _Function(CFuncPtr):
            _flags_ = FUNCFLAG_CDECL
            _restype_ = c_int

        class _ErrnoFunction(CFuncPtr):
            _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
            _restype_ = c_int

        class _PythonFunction(CFuncPtr):
            _flags_ = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI
            _restype_ = c_int

        class _Callback(CFuncPtr):
            _flags_ = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI
            _restype_ = c_int
            _argtypes_ = ()

        class CDLL:
            """A loaded library; its functions are attributes, made at their first use."""

            def __init__(self, name, use_errno=False, kind=None):
                self._handle = dlopen(name, 0)
                self._kind = kind or (_ErrnoFunction if use_errno else _Function)

            def __getattr__(self, name):
                function = self._kind((name, self))
                function.__name__ = name
                setattr(self, name, function)
                return function

        def create_string_buffer(init, size=None):
            """A mutable array of chars: `init` bytes, or `init`'s content with room for `size`."""
            if isinstance(init, int):
                return (c_char * init)()
            buffer = (c_char * (len(init) + 1 if size is None else size))()
            buffer.value = init
            return buffer

        def function_at(address):
            """The C function at `address`; it returns an int, and leaves errno alone."""
            return _Function(address)

        def locked_function_at(address):
            """As `function_at`; the interpreter's lock stays this thread's."""
            return _PythonFunction(address)

        def callback(function):
            """A C function without arguments that calls `function`, which returns an int: its address is what this
            object holds. Keep it for as long as that may be called."""
            return _Callback(function)

        def symbol_address(library, name):
            """Where the variable `name` of a library is."""
            return c_ulong.from_address(addressof(getattr(library, name))).value

        pythonapi = CDLL(None, kind=_PythonFunction)
    except (ImportError, AttributeError, TypeError):
        from ctypes import (
            CDLL,
            CFUNCTYPE,
            POINTER,
            PYFUNCTYPE,
            Array,
            Structure,
            addressof,
            c_char,
            c_char_p,
            c_int,
            c_int16,
            c_int64,
            c_long,
            c_size_t,
            c_ubyte,
            c_uint,
            c_uint32,
            c_uint64,
            c_ulong,
            c_void_p,
            create_string_buffer,
            get_errno,
            pythonapi,
        )

        def function_at(address):
            return CFUNCTYPE(c_int)(address)

        def locked_function_at(address):
            return PYFUNCTYPE(c_int)(address)

        def callback(function):
            return PYFUNCTYPE(c_int)(function)

        def symbol_address(library, name):
            return addressof(c_void_p.in_dll(library, name))


__all__ = [
    "CDLL",
    "POINTER",
    "Array",
    "Structure",
    "addressof",
    "c_char",
    "c_char_p",
    "c_int",
    "c_int16",
    "c_int64",
    "c_long",
    "c_size_t",
    "c_ubyte",
    "c_uint",
    "c_uint32",
    "c_uint64",
    "c_ulong",
    "c_void_p",
    "callback",
    "create_string_buffer",
    "function_at",
    "get_errno",
    "locked_function_at",
    "pythonapi",
    "symbol_address",
]
