"""The migration stream in QMP's words (qapi/migration.json): capabilities, parameters, ``query-migrate``. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from emp.hypervisor.base import StreamInfo, StreamLimits, StreamStatus
from emp.model.errors import BadInput

CAPABILITIES = ("events", "return-path", "pause-before-switchover", "validate-uuid", "multifd", "late-block-activate")
"""On at both ends. Without ``return-path``, ``completed`` does not mean that the target has loaded."""
YANK = {"instances": [{"type": "migration"}]}
FAILED = {"state": "failed"}
"""``migrate-continue``'s word for the state that it is to continue from"""


def capabilities(known: Iterable[str]) -> dict[str, Any]:
    """Return ``migrate-set-capabilities``' arguments; a later QEMU may have made one of ours its only behaviour."""
    return {"capabilities": [{"capability": name, "state": True} for name in CAPABILITIES if name in set(known)]}


def rate_parameters(limits: StreamLimits) -> dict[str, int]:
    """Return the parameters that may change while the stream runs. QEMU's ``max-bandwidth`` 0 is no limit, as ours."""
    if limits.downtime_limit_ms < 1:
        raise BadInput(
            "must be at least 1", field="downtime_limit_ms", hint="with 0, dirty pages are never counted again"
        )
    return {"max-bandwidth": limits.max_bandwidth_bytes_per_s, "downtime-limit": limits.downtime_limit_ms}


def channel(host: str, port: int) -> dict[str, Any]:
    """Return the ``channels`` argument for a TCP address; port 0 lets the kernel choose one to listen on."""
    address = {"transport": "socket", "type": "inet", "host": host, "port": str(port)}
    return {"channels": [{"channel-type": "main", "addr": address}]}


def status(text: str | None) -> StreamStatus:
    try:
        return StreamStatus(text or "none")
    except ValueError:
        return StreamStatus.OTHER


def stream_info(reply: dict[str, Any]) -> StreamInfo:
    """Return ``query-migrate``'s reply in our units (QEMU: ms, Mbit/s, pages/s)."""
    ram = reply.get("ram", {})
    return StreamInfo(
        status=status(reply.get("status")),
        error=reply.get("error-desc"),
        total_ms=reply.get("total-time", 0),
        downtime_ms=reply.get("downtime"),
        setup_ms=reply.get("setup-time"),
        memory_bytes=ram.get("total", 0),
        remaining_bytes=ram.get("remaining", 0),
        transferred_bytes=ram.get("transferred", 0),
        dirty_bytes_per_s=ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096),
        bandwidth_bytes_per_s=ram.get("mbps", 0.0) * 1e6 / 8,
        passes=ram.get("dirty-sync-count", 0),
    )


def listening_port(reply: dict[str, Any]) -> int | None:
    """Return the port in ``query-migrate``'s ``socket-address`` on the target; None when it does not listen."""
    for address in reply.get("socket-address", ()):
        if address.get("type") == "inet":
            return int(address["port"])
    return None
