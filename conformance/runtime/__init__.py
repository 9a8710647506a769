"""The cases of `conformance/run`, a module for each group. What they are written with is conformance/harness."""
