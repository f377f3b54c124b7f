"""The nouns of the project: frozen, without I/O, shared by controller, agents, client and CLI.

``errors`` one tree of typed errors · ``names`` what a name, a size and an address may look like · ``node`` a bare-metal
node and what it reports · ``evm`` an elastic VM · ``volume`` · ``migration`` a migration's request, progress and
report · ``orders`` what the controller asks of an agent.
"""
