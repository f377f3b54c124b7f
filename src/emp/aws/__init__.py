"""How drivers call AWS: ``api`` makes one call with patience and typed errors, ``patience`` paces what is repeated."""
