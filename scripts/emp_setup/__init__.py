"""The set-up of a checkout: Debian packages, QEMU, the Python environment.

Standard library only: it runs before anything else is there.
"""
