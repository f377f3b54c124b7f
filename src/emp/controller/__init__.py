"""The pool's daemon: it keeps the records, places and starts EVMs, plans and supervises migrations, and serves people.

It touches a node only through the agent's API, and is never needed inside a blackout. What is decided lives in pure
functions (``placement``, ``addresses``, ``attested``, ``restart``, ``emp.migration``); what is kept lives in ``book``;
``boot``, ``evms``, ``migrations`` and ``supervise`` carry it out; ``api`` shows it to people. ``wiring`` picks drivers.
"""
