"""The URLs of storage that every node reaches, read into what QEMU opens. Pure.

``nbds://HOST[:PORT]/EXPORT[?tls-hostname=NAME]``
    NBD under TLS (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md). The server's certificate is
    verified against the pool's CA, and must carry the host, or NAME. ``nbd://`` is refused: such storage is reached
    over a network, and a pool has no switch that turns TLS off.
``rbd:POOL/[NAMESPACE/]IMAGE[:id=USER][:conf=PATH]``
    A Ceph image, as QEMU writes it (docs/system/qemu-block-drivers.rst). Keys are found by librados, as the cluster's
    configuration on each node says; none may stand in the URL. A snapshot (``@NAME``) is refused: it cannot be written.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from emp.model.errors import BadInput
from emp.model.volume import NbdEndpoint, RbdImage

NBD_PORT = 10809
LONGEST = 512
FORMS = "nbds://HOST[:PORT]/EXPORT or rbd:POOL/IMAGE[:id=USER]"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_EXPORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+:-]{0,254}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_PATH = re.compile(r"/[A-Za-z0-9._/-]{1,200}")


def parse_url(url: str) -> NbdEndpoint | RbdImage:
    """Return what the URL names. Raises ``BadInput`` naming ``url``."""
    if not url.isascii() or not url.isprintable() or len(url) > LONGEST:
        raise _bad(f"not a URL of at most {LONGEST} printable characters")
    scheme = url.partition(":")[0].lower()
    match scheme:
        case "nbds":
            return _nbd(url)
        case "rbd":
            return _rbd(url.partition(":")[2])
        case "nbd":
            hint = "serve it under TLS with a certificate of the pool's CA, and write nbds://"
            raise _bad("nbd:// is not encrypted, and this pool's nodes would reach it over a network", hint=hint)
    raise _bad(f"{url[:60]!r} is no storage that every node can reach")


def format_url(where: NbdEndpoint | RbdImage) -> str:
    """Return the one URL of that storage: what is the same is written the same."""
    if isinstance(where, NbdEndpoint):
        host = f"[{where.host}]" if ":" in where.host else where.host
        name = "" if where.tls_hostname == where.host else f"?tls-hostname={where.tls_hostname}"
        return f"nbds://{host}:{where.port}/{where.export}{name}"
    options = "".join(f":{key}={value}" for key, value in (("id", where.user), ("conf", where.conf)) if value)
    return f"rbd:{'/'.join(filter(None, (where.pool, where.namespace, where.image)))}{options}"


def storage_of(where: NbdEndpoint | RbdImage) -> str:
    """Return what tells one storage from another, however it is reached."""
    if isinstance(where, NbdEndpoint):
        return format_url(where.model_copy(update={"tls_hostname": where.host}))
    return format_url(where.model_copy(update={"user": None}))


def _nbd(url: str) -> NbdEndpoint:
    try:
        parts = urlsplit(url)
        port = parts.port or NBD_PORT
    except ValueError as error:
        raise _bad(str(error)) from None
    if parts.username is not None or parts.fragment:
        raise _bad("a user or a fragment has no place in it")
    host = _host(parts.hostname or "")
    export = unquote(parts.path.removeprefix("/"))
    if not _EXPORT.fullmatch(export):
        raise _bad(
            f"{export[:60]!r} is no name of an export", hint="letters, digits and ._/+:- after a letter or digit"
        )
    return NbdEndpoint(host=host, port=port, export=export, tls_hostname=_tls_hostname(parts, host))


def _tls_hostname(parts: SplitResult, host: str) -> str:
    given = parse_qsl(parts.query, keep_blank_values=True)
    if unknown := [key for key, _ in given if key != "tls-hostname"]:
        raise _bad(f"{unknown[0][:40]!r} is not known behind the '?'", hint="tls-hostname alone is")
    if len(given) > 1:
        raise _bad("tls-hostname is given twice")
    return _host(given[0][1]) if given else host


def _host(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise _bad(f"{host[:60]!r} is no host") from None
    return host.lower()


def _rbd(text: str) -> RbdImage:
    path, *options = text.split(":")
    if "@" in path:
        raise _bad("a snapshot cannot be written", hint="name the image, or a clone of the snapshot")
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(map(_PART.fullmatch, parts)):
        raise _bad(f"{path[:60]!r} is no pool and image")
    given: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in ("id", "conf") or key in given:
            what = "key" if key in ("key", "key-secret", "password") else key[:40]
            raise _bad(
                f"the option {what!r} has no place in it", hint="id and conf, each once; keys are the nodes' own"
            )
        if not (_PART if key == "id" else _PATH).fullmatch(value):
            raise _bad(f"{value[:60]!r} is no {key}")
        given[key] = value
    namespace = parts[1] if len(parts) == 3 else None
    return RbdImage(pool=parts[0], namespace=namespace, image=parts[-1], user=given.get("id"), conf=given.get("conf"))


def _bad(message: str, *, hint: str = FORMS) -> BadInput:
    return BadInput(message, field="url", hint=hint)
