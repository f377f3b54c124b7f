"""The announcing frames, taken apart field by field as RFC 826, 5227, 4861 and 4443 lay them out."""

from __future__ import annotations

import ipaddress

from emp.network.announce import announcement, announcements

MAC = "52:54:00:12:34:56"
MAC_BYTES = bytes.fromhex("525400123456")


def test_an_ipv4_address_is_announced_as_arp_request_and_as_reply() -> None:
    request, reply = announcement(MAC, "10.77.1.5")
    ip = bytes([10, 77, 1, 5])
    for data, operation, target in ((request, 1, bytes(6)), (reply, 2, MAC_BYTES)):
        assert len(data) == 60
        assert data[:14] == b"\xff" * 6 + MAC_BYTES + b"\x08\x06"
        assert data[14:22] == b"\x00\x01\x08\x00\x06\x04" + bytes([0, operation])
        assert (data[22:28], data[28:32], data[32:38], data[38:42]) == (MAC_BYTES, ip, target, ip)


def test_an_ipv6_address_is_announced_by_an_unsolicited_advertisement() -> None:
    (data,) = announcement(MAC, "fd00::1:5")
    ip = ipaddress.IPv6Address("fd00::1:5").packed
    everyone = ipaddress.IPv6Address("ff02::1").packed
    assert data[:14] == bytes.fromhex("333300000001") + MAC_BYTES + b"\x86\xdd"
    header, message = data[14:54], data[54:]
    assert header == b"\x60\0\0\0" + len(message).to_bytes(2, "big") + bytes([58, 255]) + ip + everyone
    assert message[:2] == bytes([136, 0])
    assert message[4:8] == b"\x20\0\0\0", "override set, neither router nor solicited"
    assert message[8:24] == ip
    assert message[24:] == b"\x02\x01" + MAC_BYTES

    summed = ip + everyone + len(message).to_bytes(4, "big") + b"\0\0\0\x3a" + message
    total = sum(int.from_bytes(summed[i : i + 2], "big") for i in range(0, len(summed), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF, "a right checksum sums up to all ones"


def test_every_address_is_announced_once_before_any_is_announced_twice() -> None:
    addresses = [(MAC, "10.77.1.5"), ("52:54:00:12:34:57", "fd00::2"), ("52:54:00:12:34:58", "10.77.2.9")]
    frames = announcements(addresses)
    assert [data[6:12].hex(":") for data in frames[:3]] == [mac for mac, _ in addresses]
    assert len(frames) == 5
    assert sorted(frames) == sorted(frame for mac, ip in addresses for frame in announcement(mac, ip))


def test_nothing_to_announce_is_no_frame() -> None:
    assert announcements([]) == ()
