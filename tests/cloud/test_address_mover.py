"""The driver of EC2 addresses against the simulated cloud: where they are, in how many calls, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from emp.addresses.base import AddressMover
from emp.addresses.ec2 import Ec2AddressMover
from emp.aws.patience import Time
from emp.lab.cloud.knobs import Fault, Harm, RemapDelay
from emp.lab.cloud.knobs import Limits as Buckets
from emp.model.errors import BadInput, Conflict, NotFound, OutcomeUnknown, Refused
from tests.cloud.interfaces import BY_HAND, addresses, assign, attach_eni, holder, new_eni, primary, show_eni, take
from tests.cloud.simulator import NODES, REGION, HandClock, Simulator

EVM = ("10.77.0.20", "10.77.0.21", "10.77.0.22")
IPV6 = ("fd77:0:0:a::20", "fd77:0:0:a::21")
I1, I2 = NODES["n1"], NODES["n2"]
SLOTS = 50
FILLERS = [f"10.77.0.{number}" for number in range(130, 130 + SLOTS - 1)]


def mover_of(simulator: Simulator, clock: HandClock, **more: Any) -> Ec2AddressMover:
    return Ec2AddressMover(
        NODES,
        region=REGION,
        endpoint_url=simulator.url,
        ca_file=simulator.ca_file,
        times=Time(clock=clock, sleep=clock.sleep),
        read_s=1.0,
        **more,
    )


@pytest.fixture
async def mover(simulator: Simulator, clock: HandClock) -> AsyncIterator[Ec2AddressMover]:
    made = mover_of(simulator, clock)
    yield made
    await made.aclose()


def eni_of(ec2: Any, instance: str) -> str:
    return str(primary(ec2, instance)["NetworkInterfaceId"])


def holder_ipv6(ec2: Any, address: str) -> str | None:
    filters = [{"Name": "ipv6-addresses.ipv6-address", "Values": [address]}]
    found = ec2.describe_network_interfaces(Filters=filters)["NetworkInterfaces"]
    assert len(found) < 2, "an address is one interface's"
    return str(found[0]["Attachment"]["InstanceId"]) if found else None


def leave_ipv6(ec2: Any, instance: str, free: int) -> str:
    """Have an instance's primary interface take so many IPv6 addresses more; return its id."""
    eni = eni_of(ec2, instance)
    ec2.assign_ipv6_addresses(NetworkInterfaceId=eni, Ipv6AddressCount=SLOTS - free)
    return eni


def holders(ec2: Any, wanted: Sequence[str] = EVM) -> set[str | None]:
    return {holder(ec2, address) for address in wanted}


def test_it_is_an_address_mover(mover: Ec2AddressMover) -> None:
    def takes(mover: AddressMover) -> AddressMover:
        return mover

    assert takes(mover) is mover


async def test_addresses_move_in_one_call_and_are_waited_for(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    fresh = await mover.assign(EVM, node="n1")
    assert (fresh.calls, holders(ec2)) == (1, {I1})
    simulator.turn(remap=RemapDelay(least_s=2.0), limits=None)
    began_s = clock()
    moved = await mover.assign(EVM, node="n2")
    assert (moved.calls, holders(ec2)) == (1, {I2})
    assert 2.0 <= moved.took_s <= 2.5
    assert clock() - began_s == pytest.approx(moved.took_s, abs=0.01)
    again = await mover.assign(EVM, node="n2")
    assert (again.calls, again.took_s) == (0, 0.0), "what is done already is left"
    assert len(simulator.asked("AssignPrivateIpAddresses")) == 2


async def test_released_addresses_are_nobodys(mover: Ec2AddressMover, simulator: Simulator, ec2: Any) -> None:
    await mover.assign(EVM, node="n1")
    for _ in range(2):
        await mover.release(EVM)
        assert holders(ec2) == {None}
    assert len(simulator.asked("UnassignPrivateIpAddresses")) == 1
    await mover.assign(EVM, node="n2")
    assert holders(ec2) == {I2}


async def test_addresses_of_others_stay(mover: Ec2AddressMover, ec2: Any) -> None:
    await mover.assign(["10.77.0.50"], node="n1")
    await mover.assign(EVM, node="n1")
    await mover.release(EVM)
    assert addresses(ec2, eni_of(ec2, I1)) == ["10.77.0.101", "10.77.0.50"]


# ------------------------------------------------------------------ slots


async def test_another_interface_of_the_node_is_used_when_one_is_full(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any
) -> None:
    second = new_eni(ec2)
    attach_eni(ec2, second, I2)
    await mover.assign(EVM, node="n1")
    take(ec2, I2, *FILLERS[: SLOTS - 2])  # of which one slot is left: the addresses are not torn apart for it
    moved = await mover.assign(EVM, node="n2")
    assert moved.calls == 1
    assert set(EVM) < set(addresses(ec2, second))
    assert "10.77.0.20" not in addresses(ec2, eni_of(ec2, I2))


async def test_what_no_single_interface_has_room_for_is_split(mover: Ec2AddressMover, ec2: Any) -> None:
    second = new_eni(ec2)
    attach_eni(ec2, second, I2)
    take(ec2, I2, *FILLERS[: SLOTS - 2])
    many = [f"10.77.0.{number}" for number in range(10, 60)]
    moved = await mover.assign(many, node="n2")
    assert moved.calls == 2
    assert holders(ec2, many) == {I2}
    assert len(addresses(ec2, second)) == SLOTS


async def test_a_node_without_room_is_refused_by_name_and_nothing_is_done(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any
) -> None:
    await mover.assign(EVM, node="n1")
    take(ec2, I2, *FILLERS)
    with pytest.raises(Refused, match=r"n2 .* has 0 of 50 IPv4 slots free") as caught:
        await mover.assign(EVM, node="n2")
    assert (caught.value.field, holders(ec2)) == ("interfaces", {I1})
    assert "attach another" in str(caught.value.hint)


async def test_an_order_is_given_again_where_its_slot_is(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    await mover.assign(EVM, node="n1")
    take(ec2, I2, *FILLERS[: SLOTS - 4])  # three are left, which it has once it is ordered there
    simulator.turn(remap=RemapDelay(least_s=30.0), limits=None)
    moved = await mover.assign(EVM, node="n2")
    assert (holders(ec2), moved.calls > 1) == ({I2}, True)


async def test_slots_that_others_are_on_their_way_to_count_as_taken(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    """No answer of the cloud shows them: a second EVM that goes to the same node must not run into a refusal."""
    second = new_eni(ec2)
    attach_eni(ec2, second, I2)
    other = tuple(f"10.77.0.{number}" for number in range(30, 33))
    await mover.assign(EVM, node="n1")
    await mover.assign(other, node="n1")
    take(ec2, I2, *FILLERS[: SLOTS - 4])  # three are left
    simulator.turn(remap=BY_HAND, limits=None)
    await asyncio.gather(mover.assign(EVM, node="n2"), mover.assign(other, node="n2"))
    assert holders(ec2, [*EVM, *other]) == {I2}
    assert len(addresses(ec2, eni_of(ec2, I2))) == SLOTS
    assert len(addresses(ec2, second)) == 4


async def test_a_refusal_for_what_nobody_knew_of_leads_to_the_next_interface(
    simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    """The controller that gave the earlier order is gone, and with it the knowledge of what is on its way."""
    second = new_eni(ec2)
    attach_eni(ec2, second, I2)
    take(ec2, I1, *EVM, "10.77.0.40")
    take(ec2, I2, *FILLERS[: SLOTS - 2])
    simulator.turn(remap=RemapDelay(least_s=5.0), limits=None)
    take(ec2, I2, "10.77.0.40", AllowReassignment=True)
    made = mover_of(simulator, clock)
    moved = await made.assign(EVM[:1], node="n2")
    assert moved.calls == 2
    assert EVM[0] in addresses(ec2, second)
    await made.aclose()


async def test_only_interfaces_that_are_named_are_used_and_in_that_order(
    simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    enis = [new_eni(ec2), new_eni(ec2)]
    for index, eni in enumerate(enis, start=1):
        attach_eni(ec2, eni, I2, index)
    made = mover_of(simulator, clock, interfaces={"n2": [enis[1]]})
    await made.assign(EVM, node="n2")
    assert set(EVM) < set(addresses(ec2, enis[1]))
    await made.aclose()


async def test_a_node_that_is_not_of_the_cloud_is_named(mover: Ec2AddressMover) -> None:
    with pytest.raises(NotFound, match="n99") as caught:
        await mover.assign(EVM, node="n99")
    assert "network.vpc.instances" in str(caught.value.hint)


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("harm", [Harm.LOST_REPLY, Harm.SILENT, Harm.LOST_ORDER, Harm.BROKEN, Harm.THROTTLED])
@pytest.mark.parametrize("action", ["AssignPrivateIpAddresses", "DescribeNetworkInterfaces"])
async def test_a_lost_or_throttled_answer_changes_nothing_for_the_caller(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any, harm: Harm, action: str
) -> None:
    await mover.assign(EVM, node="n1")
    simulator.turn(remap=RemapDelay(least_s=1.0), limits=None, faults=[Fault(harm=harm, action=action)])
    moved = await mover.assign(EVM, node="n2")
    assert holders(ec2) == {I2}
    assert moved.took_s < 3.0, "an order that was applied takes no longer for being given again"
    simulator.turn(limits=None, faults=[Fault(harm=harm, action="UnassignPrivateIpAddresses")])
    await mover.release(EVM)
    assert holders(ec2) == {None}


async def test_a_whole_pool_moves_under_the_limits_of_the_api(simulator: Simulator, clock: HandClock, ec2: Any) -> None:
    mover = mover_of(simulator, clock, confirm_s=3600.0)  # the pauses of all of them add up on this clock
    evms = [tuple(f"10.77.0.{number + part}" for part in range(3)) for number in range(10, 70, 3)]
    for evm in evms:
        await mover.assign(evm[:2], node="n1")
    simulator.turn(remap=BY_HAND, limits=Buckets(describe_bucket=5, describe_per_s=5, change_bucket=2, change_per_s=2))
    await asyncio.gather(*(mover.assign(evm[:2], node="n2") for evm in evms))
    simulator.turn(limits=None)
    assert holders(ec2, [address for evm in evms for address in evm[:2]]) == {I2}
    await mover.aclose()


async def test_a_refusal_is_told_and_the_same_order_may_be_given_again(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any
) -> None:
    await mover.assign(EVM, node="n1")
    simulator.turn(faults=[Fault(harm=Harm.DENIED, action="AssignPrivateIpAddresses")], limits=None)
    with pytest.raises(Refused, match="UnauthorizedOperation") as caught:
        await mover.assign(EVM, node="n2")
    assert (caught.value.field, holders(ec2)) == ("credentials", {I1})
    await mover.assign(EVM, node="n2")
    assert holders(ec2) == {I2}


async def test_a_cloud_that_does_not_get_it_done_leaves_it_open(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    await mover.assign(EVM, node="n1")
    simulator.turn(remap=RemapDelay(least_s=90.0, most_s=90.0), limits=None)
    with pytest.raises(OutcomeUnknown, match="n2's yet") as caught:
        await mover.assign(EVM, node="n2")
    assert caught.value.field == "addresses"
    moved = await mover.assign(EVM, node="n2")
    assert holders(ec2) == {I2}
    assert moved.took_s < 40.0, "asking again did not begin it anew"


async def _asked(simulator: Simulator, times: int) -> None:
    """Return once the cloud has been given so many orders."""
    while len(simulator.asked("AssignPrivateIpAddresses")) < times:  # noqa: ASYNC110 - it is in another thread
        await asyncio.sleep(0.01)


async def test_a_controller_that_was_killed_in_between_just_asks_again(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    await mover.assign(EVM, node="n1")
    simulator.turn(remap=RemapDelay(least_s=5.0), limits=None)
    dying = asyncio.create_task(mover.assign(EVM, node="n2"))
    await _asked(simulator, 2)
    dying.cancel()
    await asyncio.wait([dying])
    successor = mover_of(simulator, clock)
    await successor.assign(EVM, node="n2")
    assert holders(ec2) == {I2}
    await successor.aclose()


async def test_an_order_that_nobody_waits_for_any_more_does_not_undo_the_next(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any
) -> None:
    """The cloud goes by whoever comes last, so the way back waits until the way there has been answered."""
    await mover.assign(EVM, node="n1")
    slow = Fault(harm=Harm.SLOW, action="AssignPrivateIpAddresses", delay_s=0.2)
    simulator.turn(faults=[slow], limits=None)
    given_up = asyncio.create_task(mover.assign(EVM, node="n2"))
    await _asked(simulator, 2)
    given_up.cancel()
    await asyncio.wait([given_up])
    await mover.assign(EVM, node="n1", insist=True)
    await asyncio.sleep(0.5)  # nothing tells that nothing comes: the slow one would have been done by now
    assert holders(ec2) == {I1}


@pytest.mark.parametrize("harm", [Harm.LOST_REPLY, Harm.LOST_ORDER])
async def test_the_way_back_overrules_an_order_that_takes_effect_later(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any, harm: Harm
) -> None:
    """Until then all looks as if nothing had to be done."""
    await mover.assign(EVM, node="n1")
    simulator.turn(remap=RemapDelay(least_s=5.0), limits=None)
    take(ec2, I2, *EVM, AllowReassignment=True)
    simulator.turn(limits=None, faults=[Fault(harm=harm, action="AssignPrivateIpAddresses")])
    await mover.assign(EVM, node="n1", insist=True)
    clock.advance(10.0)
    assert holders(ec2) == {I1}


async def test_an_address_outside_of_the_subnet_is_refused(mover: Ec2AddressMover) -> None:
    with pytest.raises(BadInput, match=r"10\.78\.0\.7"):
        await mover.assign(["10.78.0.7"], node="n1")


# ------------------------------------------------------------------ IPv6


async def test_ipv6_goes_by_nobody_and_for_how_long_is_told(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any
) -> None:
    await mover.assign([*EVM, *IPV6], node="n1")
    simulator.turn(limits=None)
    moved = await mover.assign([*EVM, *IPV6], node="n2")
    assert (moved.ipv6_gap_is_least, moved.calls) == (False, 3)
    assert moved.ipv6_gap_s == 0.0, "the clock stands still while the cloud answers: the next look is not in it"
    here, there = (primary(ec2, instance)["Ipv6Addresses"] for instance in (I1, I2))
    assert (here, {each["Ipv6Address"] for each in there}) == ([], set(IPV6))
    await mover.release([*EVM, *IPV6])
    assert primary(ec2, I2)["Ipv6Addresses"] == []


async def test_an_ipv6_address_that_finds_no_room_stays_where_it_is(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any
) -> None:
    await mover.assign([*EVM, *IPV6], node="n1")
    simulator.turn(limits=None)
    full = primary(ec2, I2)["NetworkInterfaceId"]
    ec2.assign_ipv6_addresses(NetworkInterfaceId=full, Ipv6AddressCount=49)
    with pytest.raises(Refused, match=f"{full} has 1 of 50 IPv6 slots free"):
        await mover.assign(IPV6, node="n2")
    assert {each["Ipv6Address"] for each in primary(ec2, I1)["Ipv6Addresses"]} == set(IPV6)
    more = new_eni(ec2)
    attach_eni(ec2, more, I2)
    moved = await mover.assign(IPV6, node="n2")
    assert moved.ipv6_gap_s is not None
    assert primary(ec2, I1)["Ipv6Addresses"] == []
    there = ec2.describe_network_interfaces(NetworkInterfaceIds=[more])["NetworkInterfaces"][0]["Ipv6Addresses"]
    assert {each["Ipv6Address"] for each in there} == set(IPV6), "the interface that has room for all of them"


@pytest.mark.parametrize("remap_s", [0.0, 2.0])
async def test_two_evms_that_want_the_last_ipv6_slot_are_never_nobodys(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any, remap_s: float
) -> None:
    """Both see it free; one gets it, and what it refuses to the other stays where it is reached."""
    for address in IPV6:
        await mover.assign([address], node="n1")
    leave_ipv6(ec2, I2, 1)
    simulator.turn(remap=RemapDelay(least_s=remap_s), limits=None)
    made = await asyncio.gather(*(mover.assign([each], node="n2") for each in IPV6), return_exceptions=True)
    assert sorted(type(each).__name__ for each in made) == ["Assigned", "Refused"]
    assert sorted(str(holder_ipv6(ec2, address)) for address in IPV6) == sorted([I1, I2])
    assert len(simulator.asked("UnassignIpv6Addresses")) == 1, "nor was it for a moment"
    (refused,) = (str(each) for each in made if isinstance(each, Refused))
    assert "has 0 of 50 IPv6 slots free" in refused
    assert mover.nobodys(IPV6) == ()


async def test_an_ipv6_address_that_is_refused_unexpectedly_is_given_back(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    """No answer shows that another one is on its way to the last slot: that is known only once it was taken from n1."""
    await mover.assign(IPV6[:1], node="n1")
    full = leave_ipv6(ec2, I2, 1)
    simulator.turn(remap=RemapDelay(least_s=30.0), limits=None)
    ec2.assign_ipv6_addresses(NetworkInterfaceId=full, Ipv6Addresses=["fd77:0:0:a::99"])
    with pytest.raises(Refused, match=f"{full} has 0 of 50 IPv6 slots free"):
        await mover.assign(IPV6[:1], node="n2")
    assert mover.nobodys(IPV6) == ()
    clock.advance(30.0)
    assert holder_ipv6(ec2, IPV6[0]) == I1
    attach_eni(ec2, new_eni(ec2), I2)
    assert (await mover.assign(IPV6[:1], node="n2")).ipv6_gap_is_least is False
    assert holder_ipv6(ec2, IPV6[0]) == I2


async def test_an_ipv6_refusal_for_what_nobody_knew_of_leads_to_the_next_interface(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    await mover.assign(IPV6[:1], node="n1")
    full, other = leave_ipv6(ec2, I2, 1), new_eni(ec2)
    attach_eni(ec2, other, I2)
    simulator.turn(remap=RemapDelay(least_s=15.0), limits=None)
    ec2.assign_ipv6_addresses(NetworkInterfaceId=full, Ipv6Addresses=["fd77:0:0:a::99"])
    moved = await mover.assign(IPV6[:1], node="n2")
    assert [each["Ipv6Address"] for each in show_eni(ec2, other)["Ipv6Addresses"]] == [IPV6[0]]
    assert (moved.ipv6_gap_s, moved.ipv6_gap_is_least) == (0.0, False), "nor is what the cloud takes"
    assert moved.took_s >= 15.0


async def test_the_ipv6_gap_goes_on_over_an_order_that_is_refused_and_given_again(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    await mover.assign(IPV6, node="n1")
    denied = Fault(harm=Harm.DENIED, action="AssignIpv6Addresses", times=2)  # nor may it be given back
    simulator.turn(limits=None, faults=[denied])
    with pytest.raises(Refused, match="UnauthorizedOperation"):
        await mover.assign(IPV6, node="n2")
    assert (mover.nobodys(IPV6), holder_ipv6(ec2, IPV6[0])) == (IPV6, None)
    clock.advance(7.0)
    moved = await mover.assign(IPV6, node="n2")
    assert (moved.ipv6_gap_s, moved.ipv6_gap_is_least) == (7.0, False)
    assert (mover.nobodys(IPV6), holder_ipv6(ec2, IPV6[0])) == ((), I2)


async def test_an_ipv6_address_that_its_interface_does_not_give_up_is_not_nobodys(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    await mover.assign(IPV6, node="n1")
    simulator.turn(limits=None, faults=[Fault(harm=Harm.DENIED, action="UnassignIpv6Addresses")])
    with pytest.raises(Refused, match="UnauthorizedOperation"):
        await mover.assign(IPV6, node="n2")
    assert (mover.nobodys(IPV6), holder_ipv6(ec2, IPV6[0])) == ((), I1)
    clock.advance(7.0)
    moved = await mover.assign(IPV6, node="n2")
    assert (moved.ipv6_gap_s, moved.ipv6_gap_is_least) == (0.0, False)


async def test_after_a_restart_the_ipv6_gap_is_a_lower_bound(
    mover: Ec2AddressMover, simulator: Simulator, clock: HandClock, ec2: Any
) -> None:
    await mover.assign(IPV6, node="n1")
    simulator.turn(limits=None, faults=[Fault(harm=Harm.DENIED, action="AssignIpv6Addresses", times=3)])
    with pytest.raises(Refused):
        await mover.assign(IPV6, node="n2")
    successor = mover_of(simulator, clock)
    with pytest.raises(Refused):
        await successor.assign(IPV6, node="n2")
    assert successor.nobodys(IPV6) == IPV6
    clock.advance(5.0)
    moved = await successor.assign(IPV6, node="n2")
    assert (moved.ipv6_gap_s, moved.ipv6_gap_is_least) == (5.0, True)
    await successor.aclose()
    last = mover_of(simulator, clock)
    there = await last.assign(IPV6, node="n2")
    assert (there.ipv6_gap_s, there.ipv6_gap_is_least, there.calls) == (0.0, True, 0), "it is not known, and not none"
    await last.aclose()


@pytest.mark.parametrize("harm", [Harm.LOST_REPLY, Harm.SILENT, Harm.LOST_ORDER, Harm.BROKEN, Harm.THROTTLED])
@pytest.mark.parametrize("action", ["AssignIpv6Addresses", "UnassignIpv6Addresses"])
async def test_a_lost_or_throttled_answer_leaves_no_ipv6_address_to_nobody(
    mover: Ec2AddressMover, simulator: Simulator, ec2: Any, harm: Harm, action: str
) -> None:
    await mover.assign(IPV6, node="n1")
    simulator.turn(remap=RemapDelay(least_s=1.0), limits=None, faults=[Fault(harm=harm, action=action)])
    moved = await mover.assign(IPV6, node="n2")
    assert {holder_ipv6(ec2, address) for address in IPV6} == {I2}
    assert moved.ipv6_gap_s is not None
    assert mover.nobodys(IPV6) == ()


async def test_without_ipv6_no_gap_is_told(mover: Ec2AddressMover) -> None:
    assert (await mover.assign(EVM, node="n1")).ipv6_gap_s is None


# ------------------------------------------------------------------ what pre-flight wants to know


async def test_the_facts_name_slots_prefixes_and_checks(mover: Ec2AddressMover, simulator: Simulator, ec2: Any) -> None:
    eni = take(ec2, I1, *EVM[:2])
    ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=["10.77.0.160/28"])
    ec2.modify_network_interface_attribute(NetworkInterfaceId=eni, SourceDestCheck={"Value": False})
    facts = await mover.facts([*EVM, "10.77.0.165"])
    assert facts.delegated == {"10.77.0.165": "10.77.0.160/28"}
    by_node = {each.node: each for each in facts.interfaces}
    assert (by_node["n1"].slots, by_node["n1"].free, by_node["n1"].source_dest_check) == (SLOTS, SLOTS - 4, False)
    assert (by_node["n2"].free, by_node["n2"].source_dest_check) == (SLOTS - 1, True)
    assert by_node["n1"].id == eni


async def test_an_address_of_a_delegated_prefix_does_not_move(mover: Ec2AddressMover, ec2: Any) -> None:
    eni = eni_of(ec2, I1)
    ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=["10.77.0.160/28"])
    with pytest.raises((BadInput, Conflict, Refused), match="prefix"):
        await mover.assign(["10.77.0.165"], node="n2")
    assert assign(ec2, eni, "10.77.0.30") == ["10.77.0.30"]
