"""Which addresses a network interface may be given: what AWS refuses, rule by rule.

Pages: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_AssignPrivateIpAddresses.html and
``API_AssignIpv6Addresses.html``, ``API_UnassignPrivateIpAddresses.html``, ``errors-overview.html`` there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emp.lab.cloud.eni_records import PREFIX_LENGTH, Interface
from emp.lab.cloud.errors import CloudError
from emp.lab.cloud.vpc import Subnet


def one_way(request: Mapping[str, Any], *ways: str, must: bool = True) -> str | None:
    """Return which of ``ways`` the request names. None of them: MissingParameter; more: InvalidParameterCombination."""
    named = [way for way in ways if way in request]
    if len(named) > 1:
        message = f"The parameters {', '.join(named)} cannot be used together"
        raise CloudError("InvalidParameterCombination", message)
    if not named and must:
        raise CloudError("MissingParameter", f"The request must contain one of {', '.join(ways)}")
    return named[0] if named else None


def check_ipv4(text: str, subnet: Subnet) -> str:
    """Return an address that interfaces of ``subnet`` may have; InvalidParameterValue otherwise."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        message = f"invalid value for parameter address: [{text[:60]}]"
        raise CloudError("InvalidParameterValue", message) from None
    first, last = subnet.usable
    if not first <= address <= last:
        raise CloudError("InvalidParameterValue", f"Address {text} does not fall within the subnet's address range")
    return text


def check_ipv6(text: str, subnet: Subnet) -> str:
    """As ``check_ipv4``; returned as it is written in short."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        message = f"invalid value for parameter address: [{text[:60]}]"
        raise CloudError("InvalidParameterValue", message) from None
    ends = subnet.usable_ipv6
    if ends is None or not ends[0] <= address <= ends[1]:
        raise CloudError("InvalidParameterValue", f"Address {text} does not fall within the subnet's IPv6 range")
    return str(address)


def check_prefix(text: str, subnet: Subnet, taken: Iterable[str]) -> str:
    """A /28 of the subnet in which nobody has an address; InvalidParameterValue, InvalidIPAddress.InUse.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-prefix-eni.html
    """
    try:
        block = ipaddress.IPv4Network(text)
    except ValueError:
        raise CloudError("InvalidParameterValue", f"invalid value for parameter prefix: [{text[:60]}]") from None
    if block.prefixlen != PREFIX_LENGTH or not block.subnet_of(subnet.block) or not _is_usable(block, subnet):
        raise CloudError("InvalidParameterValue", f"{text} is no /{PREFIX_LENGTH} of the subnet {subnet.cidr}")
    if any(block.overlaps(ipaddress.IPv4Network(each)) for each in taken):
        raise CloudError("InvalidIPAddress.InUse", f"Addresses of {text} are in use")
    return text


def free_prefix(subnet: Subnet, taken: Iterable[str]) -> str:
    """Return the lowest block that nobody has; InsufficientCidrBlocks if there is none."""
    used = [ipaddress.IPv4Network(each) for each in taken]
    among = subnet.block if subnet.picks is None else ipaddress.IPv4Network(subnet.picks)
    if among.prefixlen <= PREFIX_LENGTH:
        for block in among.subnets(new_prefix=PREFIX_LENGTH):
            if _is_usable(block, subnet) and not any(block.overlaps(each) for each in used):
                return str(block)
    message = f"There are not enough free cidr blocks in the specified subnet {subnet.id}"
    raise CloudError("InsufficientCidrBlocks", message)


def check_removable(eni: Interface, wanted: Sequence[str]) -> None:
    """Only secondary addresses that it has can be taken from an interface."""
    for address in wanted:
        if address == eni.addresses[0]:
            raise CloudError("InvalidParameterValue", f"{address} is the primary address of {eni.id}")
    if strange := [address for address in wanted if address not in eni.addresses]:
        message = f"Some of [{', '.join(strange)}] are not assigned to interface {eni.id}"
        raise CloudError("InvalidParameterValue", message)


def _is_usable(block: ipaddress.IPv4Network, subnet: Subnet) -> bool:
    first, last = subnet.usable
    return first <= block[0] and block[-1] <= last
