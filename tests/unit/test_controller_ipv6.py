"""Which IPv6 addresses an EVM and its pods get, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from emp.controller.addresses import claims, hand_out, parse_ipv6, parse_pods
from emp.controller.config import Ipv6Subnet, Network, VpcSettings
from emp.hypervisor.qemu.guest_config import guest_config
from emp.model.errors import AlreadyExists, BadInput, Conflict, EmpError
from emp.model.evm import Ipv6, Nic, Pod
from tests.fakes.values import a_spec

SIX = Ipv6Subnet(subnet="fd77::/64", evms="fd77::1:0:0:0/80")
FOUR = {"subnet": "10.77.0.0/16", "evm_first": "10.77.1.0", "evm_last": "10.77.250.255"}
VPC = VpcSettings(region="eu-west-1", instances={"n1": "i-0123456789abcdef0"})
SEGMENT, CLOUD, NONE = Network(**FOUR, ipv6=SIX), Network(**FOUR, ipv6=SIX, vpc=VPC), Network(**FOUR)  # type: ignore[arg-type]


def six_of(network: Network, *pods: str, ipv6: tuple[str, ...] = (), taken: frozenset[str] = frozenset()) -> list[str]:
    """Return the IPv6 addresses of an EVM with two cards."""
    wishes = parse_ipv6(ipv6, nics=2)
    cards, placed = hand_out(network, taken, nics=2, pods=parse_pods(pods), ipv6=wishes)
    held: list[Nic | Pod] = [*cards, *placed]
    return [each.ipv6.address for each in held if each.ipv6]


def test_an_evm_has_none_unless_it_is_asked_for() -> None:
    assert six_of(CLOUD, "a", "b=10.77.9.1") == []


def test_a_chosen_one_ends_with_the_ipv4_address_beside_it() -> None:
    chosen = six_of(CLOUD, "a=auto", "b=10.77.9.1,auto", ipv6=("auto", "auto"))
    assert chosen == [f"fd77::1:0:a4d:{low}" for low in ("101", "102", "103", "901")]


def test_a_chosen_one_passes_by_what_is_taken_or_asked_for() -> None:
    taken = frozenset({"fd77::1:0:a4d:101"})
    assert six_of(CLOUD, "a=fd77::1:1:a4d:101", ipv6=("auto",), taken=taken) == [
        "fd77::1:2:a4d:101",
        "fd77::1:1:a4d:101",
    ]


def test_a_named_one_is_given() -> None:
    assert six_of(CLOUD, "a=fd77::1:0:0:5", "b", "c=10.77.9.1,fd77:0:0::1:0:0:6", ipv6=("fd77::1:0:0:4",)) == [
        "fd77::1:0:0:4",
        "fd77::1:0:0:5",
        "fd77::1:0:0:6",
    ]


def test_where_it_is_routed_it_has_no_neighbours_and_a_gateway() -> None:
    for network, made in (
        (CLOUD, Ipv6(address="fd77::1:0:a4d:101", prefix_length=128, gateway="fe80::1")),
        (SEGMENT, Ipv6(address="fd77::1:0:a4d:101", prefix_length=64)),
    ):
        cards, _ = hand_out(network, set(), nics=1, pods=(), ipv6=("auto",))
        assert cards[0].ipv6 == made


def test_the_guest_is_told_of_it_and_it_is_claimed() -> None:
    cards, pods = hand_out(CLOUD, set(), nics=1, pods=parse_pods(["a=auto", "b"]), ipv6=("auto",))
    spec = a_spec("web", nics=cards, pods=pods)
    assert guest_config(spec).splitlines()[1:4] == [
        "nic 0 mac 52:54:00:4d:01:01 addr 10.77.1.1/16 addr fd77::1:0:a4d:101/128 gw fe80::1",
        "pod a nic 0 mac 02:00:0a:4d:01:02 addr 10.77.1.2/16 addr fd77::1:0:a4d:102/128 gw fe80::1",
        "pod b nic 0 mac 02:00:0a:4d:01:03 addr 10.77.1.3/16",
    ]
    held = {claim.address: (claim.mac, claim.holder) for claim in claims(spec)}
    assert held["fd77::1:0:a4d:101"] == held["10.77.1.1"] == ("52:54:00:4d:01:01", "nic 0")
    assert held["fd77::1:0:a4d:102"] == held["10.77.1.2"] == ("02:00:0a:4d:01:02", "pod a")
    assert [ip for _, ip in spec.behind(0)] == [ip for _, ip in spec.addresses]


@pytest.mark.parametrize(
    ("network", "pods", "ipv6", "error", "field", "said"),
    [
        (NONE, (), ("auto",), BadInput, "ipv6[0]", "hands out no IPv6"),
        (NONE, ("a", "b=fd77::1:0:0:5"), (), BadInput, "pods[1]", "hands out no IPv6"),
        (CLOUD, (), ("fd78::5",), BadInput, "ipv6[0]", "fd78::5 is not an IPv6 address that this pool hands out"),
        (CLOUD, ("a=fd77::5",), (), BadInput, "pods[0]", "fd77::5 is not an IPv6 address that this pool hands out"),
        (CLOUD, ("a=fe80::5",), (), BadInput, "pods[0]", "fe80::5 is not an IPv6 address that this pool hands out"),
        (CLOUD, (), ("fd77::1:0:0:9",), AlreadyExists, "ipv6[0]", "fd77::1:0:0:9 is taken"),
        (CLOUD, ("a=fd77::1:0:0:5",), ("fd77::1:0:0:5",), AlreadyExists, "pods[0]", "fd77::1:0:0:5 is taken"),
        (CLOUD, (), ("auto", "auto", "auto"), BadInput, "ipv6", "3 IPv6 addresses for 2 network cards"),
        (CLOUD, (), ("10.77.9.9",), BadInput, "ipv6[0]", "'10.77.9.9' is not an IPv6 address"),
        (CLOUD, (), ("nonsense",), BadInput, "ipv6[0]", "'nonsense' is not an IPv6 address"),
        (CLOUD, (), ("fd77::1:0:0:5/64",), BadInput, "ipv6[0]", "'fd77::1:0:0:5/64' is not an IP address"),
        (CLOUD, ("a=fd77::1:0:0:5/64",), (), BadInput, "pods[0]", "'fd77::1:0:0:5/64' is not an IP address"),
        (CLOUD, ("a=fd77::1:0:0:5,auto",), (), BadInput, "pods[0]", "two IPv6 addresses for one pod"),
        (CLOUD, ("a=10.77.9.1,10.77.9.2",), (), BadInput, "pods[0]", "two IPv4 addresses for one pod"),
    ],
)
def test_what_cannot_be_given_is_refused(
    network: Network, pods: tuple[str, ...], ipv6: tuple[str, ...], error: type[EmpError], field: str, said: str
) -> None:
    with pytest.raises(error) as caught:
        six_of(network, *pods, ipv6=ipv6, taken=frozenset({"fd77::1:0:0:9"}))
    assert said in caught.value.message
    assert caught.value.field == field
    assert caught.value.hint
    assert "10.77." not in caught.value.hint, "not of the other family"


def test_a_block_that_is_used_up_beside_an_address_is_said() -> None:
    narrow = Network(**FOUR, ipv6=Ipv6Subnet(subnet="fd77::/64", evms="fd77::1:0:0/96"))  # type: ignore[arg-type]
    with pytest.raises(Conflict, match=r"no IPv6 address of fd77::1:0:0/96 is left beside 10\.77\.1\.1"):
        six_of(narrow, ipv6=("auto",), taken=frozenset({"fd77::1:a4d:101"}))


@pytest.mark.parametrize("evms", ["fd78::/80", "fd77::/97", "fd77::1/80"])
def test_a_block_that_is_not_of_the_subnet_or_too_narrow_is_refused(evms: str) -> None:
    with pytest.raises(ValidationError):
        Ipv6Subnet(subnet="fd77::/64", evms=evms)
