"""A node's daemon: it owns the node's machines, taps and the ownership of the EVMs that run here.

``journal`` what this node has promised · ``residents`` the EVMs that live here · ``adoption`` getting them back after a
restart · ``role`` ``source`` ``target`` a node's part in a migration · ``links`` the wire between two agents in a
switchover · ``console`` · ``api`` ``heartbeat`` what the controller sees · ``wiring`` picks the drivers
"""
