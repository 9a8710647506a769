"""A virtual machine with what the developers' and CI's machines may lack: systemd, pure cgroup v2, AppArmor, swap.

`hack/vm` is its door. image.py makes kernel, initrd and root disk out of Debian packages, once; disk.py puts the clone
on a disk of its own, each time; machine.py boots the two under qemu's software emulation (no KVM needed) and brings
back what the tests print, and their exit code. guest/ is what runs inside.
"""
