"""The typed client of the controller's REST API, for the command line, the lab, tests and other people's tools.

::

    with Client.from_context("lab") as client:
        migration = client.migrations.start("web", target="n2")
        for migration in client.migrations.events(migration.id):
            print(migration.stage, migration.progress.remaining_bytes)

It costs little to import (no HTTP library, no model until an answer is on its way): ``emp migrate`` is measured.
"""

from emp.client.client import Client

__all__ = ["Client"]
