"""A whole pool on one machine, in network namespaces, with the same daemons as a real one."""
