"""What a guest's frames say of its addresses: every form that RFC 826, 5227, 4861, 4862 and 2131 give them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emp.network.announce import announcement
from emp.network.learn import sightings
from tests.frames import advertisement, arp, dhcp_request, router_advertisement, solicitation, udp

MAC = "52:54:00:00:00:01"
LOCAL = "fe80::5054:ff:fe00:1"


@pytest.mark.parametrize(
    ("frame", "ip"),
    [
        (arp(MAC, "10.77.1.1", "10.77.0.1"), "10.77.1.1"),
        (arp(MAC, "10.77.1.1", "10.77.0.1", operation=2), "10.77.1.1"),
        (arp(MAC, "0.0.0.0", "10.77.1.9"), "10.77.1.9"),
        (announcement(MAC, "10.77.1.1")[0], "10.77.1.1"),
        (announcement(MAC, "fd00::1")[0], "fd00::1"),
        (solicitation(MAC, LOCAL, "fe80::9"), LOCAL),
        (solicitation(MAC, "::", "fd00::7"), "fd00::7"),
        (advertisement(MAC, LOCAL, "fd00::8"), "fd00::8"),
        (dhcp_request(MAC, "10.77.1.5"), "10.77.1.5"),
    ],
    ids=["ask", "answer", "probe", "announce", "announce-six", "solicit", "duplicate", "advertise", "dhcp"],
)
def test_a_guest_speaks_for_an_address(frame: bytes, ip: str) -> None:
    assert list(sightings(frame)) == [(MAC, ip)]


@pytest.mark.parametrize(
    "frame",
    [
        dhcp_request(MAC, "10.77.1.5", message=1),
        udp(MAC, "10.77.1.1", "10.77.0.2", 67),
        udp(MAC, "10.77.1.1", "10.77.0.2", 7777),
        router_advertisement(MAC, LOCAL),
        arp(MAC, "0.0.0.0", "224.0.0.1"),
        arp(MAC, "127.0.0.1", "10.77.0.1"),
        arp(MAC, "10.77.1.1", "10.77.0.1")[:30],
        advertisement(MAC, LOCAL, "fd00::8")[:70],
        b"",
    ],
    ids=["discover", "no-dhcp", "data", "router", "multicast", "loopback", "cut-arp", "cut-nd", "empty"],
)
def test_other_frames_say_nothing(frame: bytes) -> None:
    assert list(sightings(frame)) == []


@given(st.sampled_from([b"\x08\x06", b"\x86\xdd", b"\x08\x00", b"\x12\x34"]), st.binary(max_size=400))
def test_no_frame_is_too_strange(kind: bytes, payload: bytes) -> None:
    for mac, _ in sightings(bytes(12) + kind + payload):
        assert mac == "00:00:00:00:00:00"
