"""A Ceph image as QEMU's rbd driver opens it (qapi/block-core.json, BlockdevOptionsRbd)."""

from __future__ import annotations

from typing import Any

from emp.model.volume import RbdImage


def rbd_options(image: RbdImage) -> dict[str, Any]:
    """Return what the rbd driver needs of ``image``. Keys come from the node's Ceph configuration, never from here."""
    node: dict[str, Any] = {"driver": "rbd", "pool": image.pool, "image": image.image}
    optional = {"namespace": image.namespace, "user": image.user, "conf": image.conf}
    return node | {key: value for key, value in optional.items() if value is not None}
