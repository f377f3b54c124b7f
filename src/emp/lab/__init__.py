"""A whole pool on one machine, in network namespaces, with the same daemons as a real one.

``topology`` places and addresses · ``kernel`` the system calls behind a place · ``init`` process 1 of a place ·
``places`` make and enter them · ``scan`` which processes are whose · ``isolation`` what places share and should not ·
``state`` what is on disk of a lab · ``daemons`` their configuration and processes · ``keeper`` starts one again that
has ended · ``up``, ``down``, ``verbs`` the commands · ``partition`` cuts wires · ``power`` pulls plugs, ``bmc`` is the
same as a service · ``demo`` the first thing to run.
"""
