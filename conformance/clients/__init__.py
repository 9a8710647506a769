"""The real callers of an OCI runtime, each used as a person would, with runc first and then with ocirun."""
