"""critest, the CRI's own conformance suite, against ocid and against Debian's containerd."""
