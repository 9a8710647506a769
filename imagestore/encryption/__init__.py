"""Encrypted layers, as ocicrypt, skopeo, containerd and CRI-O have them.

Read `layers` (what a descriptor says, and what opens it), `keys` (private keys and recipients in files), `jwe` and
`pkcs7` (how a layer's key is wrapped), and `sealing` (a layer's file encrypted or decrypted, for copies). Layers of
pulls are decrypted by whoever unpacks them.
"""
