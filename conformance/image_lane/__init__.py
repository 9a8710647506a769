"""`conformance/run images`: ocid's images beside those of skopeo and umoci, over Debian's docker-registry with TLS and
passwords. Each case does the same with both and compares digests, bytes and trees; each must read what the other wrote.

    bench   the registry, both programs with their logins, a root of ocid's own
    cases   what is compared
    trees   unpacked trees as listings: kind, mode, owner, size, mtime, links, xattrs, content
"""
