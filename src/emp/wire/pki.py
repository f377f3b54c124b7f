"""The pool's own certificate authority, so that mutual TLS is on from the first start with nothing to set up.

ECDSA P-256 throughout (QEMU's GnuTLS, OpenSSL and ``ssl`` all take it). There is no revocation list: leafs live a
year at most, and a node that must not come back is fenced, not merely distrusted.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from emp.model.errors import AlreadyExists, BadInput, NotFound, Unauthenticated
from emp.model.names import check_name
from emp.wire.files import CA_CERT, IDENTITY, Owner, make_private_dir, read_private, write_private
from emp.wire.identity import Identity, Role, qemu_dn

__all__ = ["CertificateAuthority", "Credentials", "Identity", "Role", "qemu_dn"]

CA_KEY = Path("private") / "ca-key.pem"
CA_LIFE = timedelta(days=3650)
LEAF_LIFE = timedelta(days=365)
CLOCK_SKEW = timedelta(days=1)  # a machine whose clock holds local time is up to 14 hours behind
_CA_ORGANISATION = "EMP pool"


@dataclass(frozen=True)
class Credentials:
    """What one daemon needs to speak in the pool: its certificate, its key, and the CA that vouches for the others."""

    identity: Identity
    pool: str
    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)

    @property
    def expires_at(self) -> datetime:
        return x509.load_pem_x509_certificate(self.cert_pem).not_valid_after_utc

    def write(self, directory: Path, *, owner: Owner | None = None) -> None:
        """Write ``identity.pem`` and ``ca-cert.pem`` for ``emp.wire.tls``, and what QEMU's ``tls-creds-x509`` reads.

        The directory becomes 0700, every file 0600, all owned by ``owner`` (uid, gid) if given. Each file is replaced
        atomically; QEMU's are pairs, so give a QEMU that may start at this moment a directory of its own.
        """
        make_private_dir(directory, owner=owner)
        files = {CA_CERT: self.ca_pem, IDENTITY: self.cert_pem + self.key_pem}
        for end in ("server", "client"):
            files |= {f"{end}-key.pem": self.key_pem, f"{end}-cert.pem": self.cert_pem}
        for name, data in files.items():
            write_private(directory / name, data, owner=owner)

    @classmethod
    def load(cls, directory: Path, *, of_pool: str | None = None) -> Credentials:
        """Read what ``write`` wrote, or what an external CA issued in the same form; ``NotFound`` or ``BadInput``.

        ``of_pool``: what is of another pool is refused.
        """
        pem, ca_pem = read_private(directory / IDENTITY), read_private(directory / CA_CERT)
        where = directory / IDENTITY
        try:
            chain = x509.load_pem_x509_certificates(pem)
            key = serialization.load_pem_private_key(pem, password=None)
        except ValueError as error:
            raise BadInput(f"{where} does not hold a certificate and a key: {error}") from error
        if key.public_key() != chain[0].public_key():
            raise BadInput(f"certificate and key in {where} do not belong together")
        uris = _uris(chain[0])
        pool = uris[0].removeprefix("emp://").partition("/")[0] if uris else ""
        subject = [
            ("commonName" if part.oid == NameOID.COMMON_NAME else part.rfc4514_attribute_name, str(part.value))
            for part in chain[0].subject
        ]
        try:
            identity = Identity.from_certificate(subject, uris, pool=pool)
        except Unauthenticated as error:
            raise BadInput(f"{where}: {error.message}", hint=error.hint) from None
        if of_pool not in (None, pool):
            raise BadInput(f"the credentials are of the pool {pool}, not {of_pool}", field="credentials")
        return cls(identity, pool, ca_pem, b"".join(map(_cert_pem, chain)), _key_pem(key))


class CertificateAuthority:
    """The key that makes a pool, in a directory of the controller's host: ``ca-cert.pem``, ``private/ca-key.pem``."""

    def __init__(self, cert: x509.Certificate, key: ec.EllipticCurvePrivateKey, pool: str) -> None:
        self._cert = cert
        self._key = key
        self.pool = pool

    @classmethod
    def create(cls, directory: Path, pool_name: str, *, now: datetime | None = None) -> CertificateAuthority:
        """Make a new CA in ``directory``; ``AlreadyExists`` when there is one: replacing it would cut off the pool."""
        check_name(pool_name, field="pool")
        now = now or datetime.now(UTC)
        make_private_dir(directory)
        make_private_dir(directory / CA_KEY.parent)
        if (directory / CA_CERT).exists():
            raise AlreadyExists(f"{directory} holds a certificate authority", hint="load it instead")
        if not (directory / CA_KEY).exists():  # it does after a crash between the two files: then go on with it
            write_private(directory / CA_KEY, _key_pem(ec.generate_private_key(ec.SECP256R1())), new=True)
        key = _load_key(directory / CA_KEY)
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, _CA_ORGANISATION),
                x509.NameAttribute(NameOID.COMMON_NAME, pool_name),
            ]
        )
        public = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        cert = (
            _builder(name, name, key.public_key(), now - CLOCK_SKEW, now + CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(public, critical=False)
            .sign(key, hashes.SHA256())
        )
        write_private(directory / CA_CERT, _cert_pem(cert), new=True)
        return cls(cert, key, pool_name)

    @classmethod
    def load(cls, directory: Path) -> CertificateAuthority:
        """Read what ``create`` made; ``NotFound`` without it, ``BadInput`` when it is damaged or others can read it."""
        try:
            key = _load_key(directory / CA_KEY)
            cert = x509.load_pem_x509_certificate(read_private(directory / CA_CERT))
        except NotFound as error:
            raise NotFound(f"no certificate authority in {directory}: {error.message}") from None
        except ValueError as error:
            raise BadInput(f"the certificate authority in {directory} is damaged: {error}") from error
        if key.public_key() != cert.public_key():
            raise BadInput(f"the certificate authority in {directory} is damaged: key and certificate do not match")
        return cls(cert, key, str(cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value))

    @property
    def ca_pem(self) -> bytes:
        """The certificate that everybody in the pool, and its users' CLI, trusts. Not secret."""
        return _cert_pem(self._cert)

    def issue(
        self,
        role: Role,
        name: str,
        sans: Sequence[str] = (),
        *,
        life: timedelta = LEAF_LIFE,
        now: datetime | None = None,
    ) -> Credentials:
        """Return fresh credentials for ``<role>-<name>``, valid for that name and for ``sans`` (IPs or DNS names).

        Raises ``BadInput`` for a name that is not a label or that is too long.
        """
        identity = Identity(role, name)
        now = now or datetime.now(UTC)
        until = min(now + life, self._cert.not_valid_after_utc)
        names = [
            x509.DNSName(identity.cn),
            *map(_general_name, sans),
            x509.UniformResourceIdentifier(identity.uri(self.pool)),
        ]
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.cn)])
        both_ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        authority = self._cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        cert = (
            _builder(subject, self._cert.subject, key.public_key(), min(now, until) - CLOCK_SKEW, until)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            # no key is enciphered with ECDSA, but QEMU 10.0 refuses a certificate whose usage does not allow it
            .add_extension(_key_usage(digital_signature=True, key_encipherment=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both_ends), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Credentials(identity, self.pool, self.ca_pem, _cert_pem(cert), _key_pem(key))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, since: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(since)
        .not_valid_after(until)
    )


def _key_usage(**allowed: bool) -> x509.KeyUsage:
    usages = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**(dict.fromkeys(usages, False) | allowed))


def _general_name(text: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(text))
    for label in text.split("."):
        check_name(label, field="sans")
    return x509.DNSName(text)


def _uris(cert: x509.Certificate) -> list[str]:
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith("emp://")]


def _cert_pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_private(path), password=None)
    except ValueError as error:
        raise BadInput(f"{path} does not hold a key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput(f"the key in {path} is not an elliptic curve key")
    return key


def _key_pem(key: PrivateKeyTypes) -> bytes:
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, plain)
