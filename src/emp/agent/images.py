"""The guest images that lie ready on this node: ``<images_dir>/<name>/{kernel,initrd,image.json}``."""

from __future__ import annotations

from pathlib import Path

from emp.model.base import Model
from emp.model.errors import NotFound


class NodeImage(Model):
    name: str
    digest: str
    kernel_command_line: str
    pod_ipv6: bool = True
    """it gives a pod the IPv6 address that its EVM's record says"""


class Images:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def all(self) -> list[NodeImage]:
        """Return every image here."""
        return [self._read(path) for path in sorted(self._directory.glob("*/image.json"))]

    def get(self, name: str) -> tuple[NodeImage, Path, Path]:
        """Return the image, its kernel and its initrd; raise ``NotFound`` if this node does not have it."""
        folder = self._directory / name
        if not (folder / "image.json").exists():
            raise NotFound(f"image {name!r} is not on this node", field="image", hint="install it in images_dir")
        return self._read(folder / "image.json"), folder / "kernel", folder / "initrd"

    @staticmethod
    def _read(path: Path) -> NodeImage:
        return NodeImage.model_validate_json(path.read_bytes())
