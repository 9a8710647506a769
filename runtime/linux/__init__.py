"""The leaf that talks to the kernel: the only place with ctypes, syscall numbers, ioctls and procfs formats.

One small function a syscall, under the syscall's name; no policy, no logging, no state. It refuses to interpret what
it is told to do. Invariant: every fd made here is close-on-exec, and every failure is an OSError that names the call,
its object and the errno.
"""
