"""EMP live migration: moves running EVMs between the bare-metal nodes of a pool."""

__version__ = "0.1.0"
