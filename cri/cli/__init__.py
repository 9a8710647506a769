"""The `ocid` command: one module a subcommand, each with HELP, `arguments(parser)` and `run(args, ...)`.

Refuses to know how anything works: it speaks CRI to a daemon, or to the same verbs in this process. Invariant: nothing
heavy is imported before the subcommand is known.
"""
