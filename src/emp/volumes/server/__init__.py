"""The volume service of a pool without a cloud: block volumes on this machine's disk, served over NBD.

``protocol`` what travels, shared with ``emp.volumes.nbd`` · ``config`` its settings · ``state`` its memory, on disk ·
``epochs`` their history ·
``export`` one qemu-nbd process · ``service`` what may be done with volumes · ``app`` the same over HTTPS ·
``python -m emp.volumes.server --config FILE`` runs it.

The control plane is this daemon, which only the controller may call. The data plane is one qemu-nbd process per
(volume, node, epoch) under TLS, open to that node's certificate alone; it outlives a crash of the daemon, and is
restarted on the same port when it dies itself.
"""
