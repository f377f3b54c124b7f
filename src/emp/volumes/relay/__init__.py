"""A relay: shows a node a volume that is attached elsewhere, and lets it move without its client noticing.

One process per volume and end. ``__main__`` is the program (start there), ``manager`` starts and orders it for the
agent. The program imports neither pydantic nor FastAPI: it starts in the time of a plain Python.
"""
