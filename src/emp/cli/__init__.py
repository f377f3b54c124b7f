"""The command line ``emp``: a client of the REST API and nothing else, one module per noun.

Only the module of the noun that is asked for is imported, and rich only when something is drawn: the start of
``emp migrate`` is part of a measured overhead.
"""
