"""The pool's CA, its credentials and who they say one is."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from emp.model.errors import AlreadyExists, BadInput, NotFound, Unauthenticated
from emp.wire.pki import CertificateAuthority, Credentials, Identity, Role, qemu_dn

POOL = "meadow"


@pytest.fixture
def ca(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", POOL)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_certificate_has_one_common_name_and_nothing_else_as_subject(ca: CertificateAuthority) -> None:
    cert = x509.load_pem_x509_certificate(ca.issue(Role.AGENT, "n1", ["10.0.0.7", "n1.example"]).cert_pem)
    assert cert.subject.rfc4514_string() == "CN=agent-n1" == qemu_dn(Identity(Role.AGENT, "n1"))
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["agent-n1", "n1.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["emp://meadow/agent/n1"]


def test_a_leaf_lives_a_year_and_bears_a_clock_that_is_hours_behind(ca: CertificateAuthority) -> None:
    credentials = ca.issue(Role.VOLUMES, "v1")
    cert, now = x509.load_pem_x509_certificate(credentials.cert_pem), datetime.now(UTC)
    assert timedelta(days=364) < credentials.expires_at - now <= timedelta(days=365)
    assert now - cert.not_valid_before_utc > timedelta(hours=14)


def test_no_leaf_outlives_its_ca(ca: CertificateAuthority) -> None:
    late = ca.issue(Role.AGENT, "n1", life=timedelta(days=99999))
    assert late.expires_at <= datetime.now(UTC) + timedelta(days=3650)


def test_files_are_private_and_the_ca_key_lies_apart(ca: CertificateAuthority, tmp_path: Path) -> None:
    ca.issue(Role.AGENT, "n1").write(tmp_path / "n1")
    assert mode(tmp_path / "n1") == mode(tmp_path / "ca" / "private") == 0o700
    assert {path.name: mode(path) for path in (tmp_path / "n1").iterdir()} == dict.fromkeys(
        ["ca-cert.pem", "client-cert.pem", "client-key.pem", "identity.pem", "server-cert.pem", "server-key.pem"], 0o600
    )
    assert [path.name for path in (tmp_path / "ca").glob("*.pem")] == ["ca-cert.pem"]
    assert mode(tmp_path / "ca" / "private" / "ca-key.pem") == 0o600


def test_an_owner_gets_directory_and_files(ca: CertificateAuthority, tmp_path: Path) -> None:
    ca.issue(Role.QEMU, "n1").write(tmp_path / "vm", owner=(4242, 4243))
    assert {(path.stat().st_uid, path.stat().st_gid) for path in [tmp_path / "vm", *(tmp_path / "vm").iterdir()]} == {
        (4242, 4243)
    }


def test_credentials_survive_a_round_trip_and_a_renewal(ca: CertificateAuthority, tmp_path: Path) -> None:
    first, second = ca.issue(Role.CONTROLLER, "main"), ca.issue(Role.CONTROLLER, "main")
    first.write(tmp_path / "c")
    assert Credentials.load(tmp_path / "c") == first
    second.write(tmp_path / "c")
    assert Credentials.load(tmp_path / "c") == second
    assert "PRIVATE" not in repr(second)


def test_a_ca_is_loaded_again_and_never_replaced(ca: CertificateAuthority, tmp_path: Path) -> None:
    again = CertificateAuthority.load(tmp_path / "ca")
    assert (again.pool, again.ca_pem) == (POOL, ca.ca_pem)
    with pytest.raises(AlreadyExists):
        CertificateAuthority.create(tmp_path / "ca", POOL)
    assert CertificateAuthority.load(tmp_path / "ca").ca_pem == ca.ca_pem


def test_a_creation_that_was_cut_between_its_two_files_goes_on(tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path / "ca", POOL)
    (tmp_path / "ca" / "ca-cert.pem").unlink()
    made = CertificateAuthority.create(tmp_path / "ca", POOL)
    assert CertificateAuthority.load(tmp_path / "ca").ca_pem == made.ca_pem


def test_damaged_missing_and_readable_authorities_are_refused(ca: CertificateAuthority, tmp_path: Path) -> None:
    key = tmp_path / "ca" / "private" / "ca-key.pem"
    with pytest.raises(NotFound, match="no certificate authority"):
        CertificateAuthority.load(tmp_path / "nowhere")
    key.chmod(0o644)
    with pytest.raises(BadInput, match=r"can be read by others.*chmod 600"):
        CertificateAuthority.load(tmp_path / "ca")
    key.chmod(0o600)
    CertificateAuthority.create(tmp_path / "other", POOL)
    key.write_bytes((tmp_path / "other" / "private" / "ca-key.pem").read_bytes())
    with pytest.raises(BadInput, match="do not match"):
        CertificateAuthority.load(tmp_path / "ca")
    key.write_text("rubbish")
    with pytest.raises(BadInput, match="does not hold a key"):
        CertificateAuthority.load(tmp_path / "ca")


def test_credentials_of_mixed_origin_are_refused(ca: CertificateAuthority, tmp_path: Path) -> None:
    one, two = ca.issue(Role.AGENT, "n1"), ca.issue(Role.AGENT, "n2")
    Credentials(one.identity, POOL, one.ca_pem, one.cert_pem, two.key_pem).write(tmp_path / "mixed")
    with pytest.raises(BadInput, match="do not belong together"):
        Credentials.load(tmp_path / "mixed")


@pytest.mark.parametrize("name", ["../x", "a,b=c", "", "n1.evil", "N1", "-n", "x" * 300, "x" * 58, "n\n1", "ñ"])
def test_names_that_would_not_parse_back_are_refused(ca: CertificateAuthority, name: str) -> None:
    with pytest.raises(BadInput) as caught:
        ca.issue(Role.AGENT, name)
    assert caught.value.field == "name" and caught.value.hint


def test_a_bad_alternative_name_is_refused(ca: CertificateAuthority) -> None:
    with pytest.raises(BadInput, match="sans"):
        ca.issue(Role.AGENT, "n1", ["host/../x"])


def peercert(cn: str = "agent-n1", uri: str | None = "emp://meadow/agent/n1", **more: Any) -> dict[str, Any]:
    """Build what ``ssl`` reports of a verified certificate."""
    return {
        "subject": ((("commonName", cn),),),
        "subjectAltName": (("DNS", cn), *([("URI", uri)] if uri else [])),
    } | more


def test_the_peer_is_who_common_name_and_uri_both_say() -> None:
    assert Identity.from_peercert(peercert(), pool=POOL) == Identity(Role.AGENT, "n1")
    hyphens = peercert("agent-rack-1-n1", "emp://meadow/agent/rack-1-n1")
    assert Identity.from_peercert(hyphens, pool=POOL) == Identity(Role.AGENT, "rack-1-n1")
    assert Identity.from_peercert(None, pool=POOL) is None
    assert Identity.from_peercert({}, pool=POOL) is None


@pytest.mark.parametrize(
    "cert",
    [
        pytest.param(peercert(uri="emp://meadow/agent/n2"), id="other name in the URI"),
        pytest.param(peercert(uri="emp://meadow/controller/n1"), id="other role in the URI"),
        pytest.param(peercert(uri="emp://desert/agent/n1"), id="other pool"),
        pytest.param(peercert(uri=None), id="no URI"),
        pytest.param(peercert("wizard-n1"), id="no such role"),
        pytest.param(peercert("n1"), id="no role"),
        pytest.param(
            peercert(subject=((("organizationName", "x"),), (("commonName", "agent-n1"),))), id="longer subject"
        ),
        pytest.param(peercert(subject=((("commonName", "agent-n1"), ("commonName", "agent-n2")),)), id="two names"),
        pytest.param(
            peercert(subjectAltName=(("URI", "emp://meadow/agent/n1"), ("URI", "emp://meadow/controller/main"))),
            id="two URIs",
        ),
    ],
)
def test_a_certificate_that_contradicts_itself_is_nobody(cert: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        Identity.from_peercert(cert, pool=POOL)
