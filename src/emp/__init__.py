"""EMP live migration: moves running EVMs between the bare-metal nodes of a pool."""
