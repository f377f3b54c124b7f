"""THE BOOK of a live migration; read it in this order. Everything here is pure: no socket, no clock, no file.

1. ``records``         what a node writes into its journal, and what the last record allows it to do
2. ``events``          what happens to a role, and what a role asks its daemon to do
3. ``source_brownout`` stage 1: memory is copied while the EVM runs on the source
4. ``blackout``        stage 2: the EVM is paused; last pages, **the commit**, resume on the target
5. ``target_brownout`` stage 3: the EVM runs on the target; the source is cleared
6. ``way_back``        every way back to the source, and why each is safe
7. ``source``, ``target``, ``supervisor``   the three roles: ``step(state, event) -> (state, actions)``
8. ``admission``       may a node do what it is ordered;  ``sweep``, ``recovery``  what a restarted agent does
9. ``convergence``     when pre-copy will be done;  ``preflight`` may it begin;  ``report`` what it cost

The daemons feed ``step`` with events (QMP, the link between the agents, HTTP, timers, a journal replayed) and carry out
the actions. The protocol is told in ``docs/migration.md``.
"""
