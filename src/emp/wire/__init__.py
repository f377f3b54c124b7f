"""What controller, agents, volume server and client talk *with*; what they say is in ``emp.model``.

``identity`` who is at the other end · ``pki`` the pool's own CA · ``tls`` contexts · ``sockets`` listening ·
``serve`` an app on several TLS listeners · ``guard`` who may call a route · ``faults`` errors as bodies ·
``http`` the client side, ``exchange`` what its failures mean · ``edge`` where a connection enters an app ·
``link`` the switchover's duplex link between two agents (``duplex`` the link itself, ``frames`` its frames) ·
``secret`` tokens · ``dh`` a group for QEMU's TLS · ``files`` private files, written atomically ·
``process`` what every daemon does as a process, ``config`` its file.

Nothing is re-exported here: ``http`` must stay cheap to import for the CLI (no FastAPI, uvicorn or cryptography).
"""
