"""The rules that every driver applies to its input, so that records may move from one driver to another.

The limits lie within what etcd can: 1.5 MiB in a request by default, and as many operations as ``--max-txn-ops`` says
(128 by default, which an EVM with 128 pods needs four times: each address is claimed, all at once).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from emp.model.errors import BadInput
from emp.store.base import Compare, Get, KeyValue, Op, Put

MAX_KEY_CHARACTERS = 512
MAX_OPS = 512
MAX_TXN_BYTES = 1 << 20
MAX_LIMIT = 1 << 40
MIN_TTL_S, MAX_TTL_S = 0.1, 86_400.0

_KEY = re.compile(r"/[!-~]*[!-.0-~]")
_PREFIX = re.compile(r"/([!-~]*/)?")
KEY_RULE = f"at most {MAX_KEY_CHARACTERS} printable ASCII characters, beginning with '/' and not ending with it"


def check_key(key: str, *, field: str = "key") -> str:
    """Return ``key``, or raise ``BadInput``."""
    if len(key) > MAX_KEY_CHARACTERS or not _KEY.fullmatch(key):
        raise BadInput(f"{key[:60]!r} is not a key of the store", field=field, hint=KEY_RULE)
    return key


def bounds(prefix: str) -> tuple[str, str]:
    """Return (low, high): ``prefix`` selects the keys with low <= key < high. Raises ``BadInput``."""
    if len(prefix) <= MAX_KEY_CHARACTERS and _PREFIX.fullmatch(prefix):
        return prefix, prefix[:-1] + "0"  # "0" follows "/"
    check_key(prefix, field="prefix")
    return prefix, prefix + " "  # a space comes before every character that a key may have


def check_txn(compares: Sequence[Compare], *branches: Sequence[Op]) -> None:
    """Raise ``BadInput`` if a transaction breaks a rule."""
    if len(compares) > MAX_OPS:
        raise BadInput(f"{len(compares)} compares in a transaction", field="compares", hint=f"at most {MAX_OPS}")
    size_bytes = 0
    for compare in compares:
        check_key(compare.key)
        if isinstance(compare.operand, bytes) != (compare.target == "value"):
            raise BadInput(f"{compare.target} is compared with {compare.operand!r:.60}", field="compares")
        size_bytes += len(compare.operand) if isinstance(compare.operand, bytes) else 0
    for ops in branches:
        if len(ops) > MAX_OPS:
            raise BadInput(f"{len(ops)} operations in a transaction", field="ops", hint=f"at most {MAX_OPS}")
        changed: set[str] = set()
        for op in ops:
            check_key(op.key)
            if isinstance(op, Put):
                if not isinstance(op.value, bytes):
                    raise BadInput(f"the value of {op.key} is not bytes", field="value")
                if not 0 <= op.lease < 1 << 63:
                    raise BadInput(f"{op.lease} is not a lease", field="lease", hint="what grant() returned, or 0")
                size_bytes += len(op.value)
            if isinstance(op, Get):
                continue
            if op.key in changed:
                raise BadInput(f"{op.key} is changed twice in one transaction", field="ops")
            changed.add(op.key)
    if size_bytes > MAX_TXN_BYTES:
        raise BadInput(f"a transaction of {size_bytes} bytes", field="value", hint=f"at most {MAX_TXN_BYTES} in all")


def check_ttl(ttl_s: float) -> float:
    """Return ``ttl_s``, or raise ``BadInput``."""
    if not math.isfinite(ttl_s) or not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise BadInput(f"a TTL of {ttl_s} s", field="ttl_s", hint=f"from {MIN_TTL_S} to {MAX_TTL_S:.0f} seconds")
    return ttl_s


def check_limit(limit: int | None) -> int:
    """Return ``limit``, a very large one for None, or raise ``BadInput``."""
    if limit is not None and limit < 1:
        raise BadInput(f"a limit of {limit}", field="limit", hint="1 or more, or none")
    return MAX_LIMIT if limit is None else min(limit, MAX_LIMIT)


def check_revision(revision: int) -> int:
    """Return ``revision``, or raise ``BadInput`` if it is negative."""
    if revision < 0:
        raise BadInput(f"{revision} is not a revision", field="revision", hint="0 or more")
    return revision


def holds(compare: Compare, kv: KeyValue | None) -> bool:
    """Return whether ``compare`` holds for its key as it stands (``kv``, None when absent)."""
    actual: int | bytes
    if kv is not None:
        actual = getattr(kv, compare.target)
    elif compare.target == "value":
        return False
    else:
        actual = 0
    match compare.relation:
        case "=":
            return actual == compare.operand
        case "!=":
            return actual != compare.operand
        case "<":
            return actual < compare.operand  # type: ignore[operator]  # check_txn made the types equal
        case ">":
            return actual > compare.operand  # type: ignore[operator]
