"""Image layers in, mounts as data out.

Read `overlay` (the two interfaces), `layers` (the road of a layer) and `layout` (what is where). A layer's bytes go
through `arriving`, `sealed` (where they are encrypted), `inflate`, `tar` (with tar_feed, tar_fields, tar_sparse),
`extract` on `tree`, and `finish` on `merged`, in the processes of `worker`, which `pool` keeps.
"""
