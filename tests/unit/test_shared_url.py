"""URLs of storage that every node reaches: what they mean, and what is refused and why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emp.model.errors import BadInput
from emp.model.volume import NbdEndpoint, RbdImage
from emp.volumes.shared_url import format_url, parse_url, storage_of

READ: dict[str, NbdEndpoint | RbdImage] = {
    "nbds://store/disk": NbdEndpoint(host="store", port=10809, export="disk", tls_hostname="store"),
    "nbds://Store.Example:12/a/b": NbdEndpoint(
        host="store.example", port=12, export="a/b", tls_hostname="store.example"
    ),
    "nbds://[fd00::7]:12/x": NbdEndpoint(host="fd00::7", port=12, export="x", tls_hostname="fd00::7"),
    "nbds://10.0.0.7/x?tls-hostname=volumes-store": NbdEndpoint(
        host="10.0.0.7", port=10809, export="x", tls_hostname="volumes-store"
    ),
    "rbd:vms/web": RbdImage(pool="vms", image="web"),
    "rbd:vms/team/web:id=emp": RbdImage(pool="vms", namespace="team", image="web", user="emp"),
    "rbd:vms/web:conf=/etc/ceph/b.conf:id=emp": RbdImage(pool="vms", image="web", user="emp", conf="/etc/ceph/b.conf"),
}


@pytest.mark.parametrize("url", READ)
def test_a_url_says_what_qemu_opens(url: str) -> None:
    assert parse_url(url) == READ[url]
    assert parse_url(format_url(READ[url])) == READ[url]


REFUSED = {
    "nbd://store/disk": "not encrypted",
    "nbd://127.0.0.1/disk": "not encrypted",
    "nbds://store": "no name of an export",
    "nbds://store/": "no name of an export",
    "nbds:///disk": "is no host",
    "nbds://store/a,b": "no name of an export",
    "nbds://store/-x": "no name of an export",
    "nbds://a:b@store/disk": "a user",
    "nbds://store/disk#x": "fragment",
    "nbds://store:0x7/disk": "Port",
    "nbds://store:70000/disk": "Port",
    "nbds://st_ore/disk": "is no host",
    "nbds://store/disk?tls-verify-peer=false": "tls-verify-peer",
    "nbds://store/disk?tls-hostname=a&tls-hostname=b": "twice",
    "nbds://store/disk?tls-hostname=": "is no host",
    "rbd:vms": "no pool and image",
    "rbd:vms/": "no pool and image",
    "rbd:a/b/c/d": "no pool and image",
    "rbd:vms/web@before": "snapshot",
    "rbd:vms/web:id=emp:id=x": "'id'",
    "rbd:vms/web:key=AQBz": "keys are the nodes' own",
    "rbd:vms/web:mon_host=10.0.0.1": "mon_host",
    "rbd:vms/web:conf=ceph.conf": "is no conf",
    "rbd:vms/web:id=": "is no id",
    "rbd:vms/-web": "no pool and image",
    "file:///etc/shadow": "no storage",
    "/dev/sda": "no storage",
    "": "no storage",
    "nbds://store/di\nsk": "printable",
    "nbds://störe/disk": "printable",
    "nbds://store/" + "x" * 600: "printable",
}


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_no_such_storage_is_refused_with_the_reason(url: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_url(url)
    assert caught.value.field == "url"
    assert REFUSED[url] in f"{caught.value.message} {caught.value.hint}"
    assert "AQBz" not in str(caught.value), "a secret is not repeated"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("nbds://store/disk", "nbds://STORE:10809/disk", True),
        ("nbds://store/disk", "nbds://store/disk?tls-hostname=volumes-store", True),
        ("nbds://[fd00:0::7]/disk", "nbds://[fd00::7]/disk", True),
        ("nbds://store/disk", "nbds://store/Disk", False),
        ("nbds://store:1/disk", "nbds://store:2/disk", False),
        ("rbd:vms/web", "rbd:vms/web:id=emp", True),
        ("rbd:vms/web", "rbd:vms/web:conf=/etc/ceph/b.conf", False),
        ("rbd:vms/a/web", "rbd:vms/b/web", False),
    ],
)
def test_one_storage_is_known_again_however_it_is_written(one: str, other: str, same: bool) -> None:
    assert (storage_of(parse_url(one)) == storage_of(parse_url(other))) is same


@given(st.text(max_size=60), st.sampled_from(["nbds://", "rbd:", "nbds://store/", "rbd:p/i:", ""]))
def test_no_text_does_anything_but_be_read_or_refused(text: str, begin: str) -> None:
    try:
        found = parse_url(begin + text)
    except BadInput:
        return
    assert parse_url(format_url(found)) == found
