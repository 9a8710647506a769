"""Images from one place to another, none of which need be the store: what `ocid copy`, `save` and `push` do.

places      docker://… oci:… oci-archive:… docker-archive:… dir:…      the words for them
contents    what a manifest names, also one that is no image
targets     where to: a registry, a layout, an archive, a directory
convert     other media types, other compression
copy        from a source to a target, blob by blob
"""
