"""The pool's real daemons on a fake clock, network, disk and QEMU, from one seed: see ``docs/simulation.md``."""
