"""A node that comes back with an old disk: its word is not taken until a person says so."""

from __future__ import annotations

from emp.model.evm import EvmState
from tests.lab.conftest import Pool
from tests.lab.pool import agent_away, subject, until


def test_a_node_with_a_restored_journal_is_not_believed_until_it_is_readmitted(pool: Pool) -> None:
    journal = pool.files.data("n3") / "journal"
    with subject(pool, node="n3") as evm:
        with agent_away(pool, evm.client, "n3"):
            backup = journal.read_bytes()
        until(lambda: evm.record.state is EvmState.RUNNING, "it is adopted")
        evm.migrate("n2")
        boot_id = evm.boot_id
        with agent_away(pool, evm.client, "n3"):
            right = journal.read_bytes()
            journal.write_bytes(backup)
            pool.run_in("n3", "rm", "-f", "/run/emp/journal-seen")  # as after a boot of the host
        until(lambda: evm.client.nodes.get("n3").quarantine, "n3 is quarantined")
        shown = pool.emp("node", "show", "n3").stdout
        assert "quarantined" in shown and "old disk or a restored backup" in " ".join(shown.split())
        refused = pool.emp("migrate", evm.name, "--to", "n3", check=False)
        assert (refused.returncode, "it is quarantined" in refused.stderr) == (7, True)
        record = evm.record
        assert (record.owner, record.state) == ("n2", EvmState.RUNNING), "what an old journal says of it is nothing"
        assert (set(evm.qemus()), evm.boot_id) == ({"n2"}, boot_id)

        with agent_away(pool, evm.client, "n3"):
            journal.write_bytes(right)
            pool.run_in("n3", "rm", "-f", "/run/emp/journal-seen")
        assert evm.client.nodes.get("n3").quarantine, "a person decides"
        said = pool.emp("node", "readmit", "n3", check=False)
        assert (said.returncode, "for the truth" in " ".join(said.stderr.split())) == (2, True)
        pool.emp("node", "readmit", "n3", "--confirm")
        evm.check_only_on("n2")
        until(lambda: evm.client.nodes.get("n3").quarantine is None, "n3 is readmitted")
        evm.migrate("n3")
        evm.check_only_on("n3")
        assert evm.boot_id == boot_id
