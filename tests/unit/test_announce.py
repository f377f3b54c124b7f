"""The announcing frames, taken apart field by field as RFC 826, 5227, 4861 and 4443 lay them out."""

from __future__ import annotations

import ipaddress

from emp.network.announce import announcement, announcements, membership_queries

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


def test_a_guest_is_asked_for_its_groups_over_ipv4_and_ipv6() -> None:
    igmp, mld = membership_queries("fe:54:00:12:34:56")
    assert igmp[:14] == bytes.fromhex("01005e000001") + bytes.fromhex("fe5400123456") + b"\x08\x00"
    header, query = igmp[14:38], igmp[38:50]
    assert (header[8], header[9], header[12:16], header[16:20]) == (1, 2, bytes(4), bytes([224, 0, 0, 1]))
    assert header[20:24] == b"\x94\x04\0\0", "router alert, RFC 2113"
    assert (query[0], query[1], query[4:8], query[8:12]) == (0x11, 1, bytes(4), bytes([2, 125, 0, 0]))
    for part in (header, query):
        assert summed(part) == 0xFFFF

    assert mld[:14] == bytes.fromhex("333300000001") + bytes.fromhex("fe5400123456") + b"\x86\xdd"
    header, alert, message = mld[14:54], mld[54:62], mld[62:]
    assert header[6:8] == bytes([0, 1]), "a hop-by-hop header follows, one hop"
    assert str(ipaddress.IPv6Address(header[8:24])) == "fe80::fc54:ff:fe12:3456"
    assert alert == bytes([58, 0, 5, 2, 0, 0, 1, 0]), "router alert, RFC 2711"
    assert (message[0], message[4:6], message[8:24], message[24:]) == (130, b"\0\x64", bytes(16), bytes([2, 125, 0, 0]))
    assert summed(header[8:40] + len(message).to_bytes(4, "big") + b"\0\0\0\x3a" + message) == 0xFFFF


def summed(data: bytes) -> int:
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total
