"""The runc-compatible runtime: an OCI bundle in, an isolated process out; `ocirun` at a terminal, shims under CRI.

Refuses to know of images, pods or Kubernetes. Imports the standard library and itself only (a test holds this).
"""
