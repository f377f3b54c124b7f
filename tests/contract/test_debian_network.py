"""The image `debian` gives its cards their addresses by a script: here the script itself, in a namespace with cards."""

from __future__ import annotations

import subprocess
from pathlib import Path

from emp.lab.debian import SOURCES

CARDS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
CONFIG = """\
nic 0 mac 52:54:00:00:00:01 addr 10.77.1.1/16 addr fd77::e:1/128 gw fe80::1
nic 1 mac 52:54:00:00:00:02 addr 10.77.1.2/16 addr fd77::e:2/128 gw fe80::1
"""
STAGE = """
mount -t sysfs none /sys
mount -t tmpfs none /etc
{cards}
/bin/sh {script}
ip -6 route get fd78::1 from fd77::e:1
ip -6 route get fd78::1 from fd77::e:2
"""


def test_what_comes_from_the_second_cards_ipv6_address_leaves_by_that_card(tmp_path: Path) -> None:
    """In a VPC the node drops it else: its way back is another tap."""
    (tmp_path / "config").write_text(CONFIG)
    text = (SOURCES / "root/usr/local/sbin/emp-network").read_text()
    path = "/sys/firmware/qemu_fw_cfg/by_name/opt/emp/config/raw"
    assert path in text
    (tmp_path / "script").write_text(text.replace(path, str(tmp_path / "config")))
    cards = "\n".join(f"ip link add card{n} address {mac} type bridge" for n, mac in enumerate(CARDS))
    stage = STAGE.format(cards=cards, script=tmp_path / "script")
    argv = ["unshare", "--net", "--mount", "sh", "-euc", stage]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    first, second = [line for line in done.stdout.splitlines() if " via fe80::1 " in line]
    assert " dev card0 " in first
    assert " dev card1 " in second
