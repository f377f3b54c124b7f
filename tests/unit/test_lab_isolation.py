"""The part of the isolation checker that reasons about mounts, on tables written by hand."""

from __future__ import annotations

from emp.lab.isolation import covering, visible_at
from emp.lab.kernel import Mount


def table(*lines: str) -> list[Mount]:
    return [Mount(line) for line in lines]


ROOT = "1 0 254:0 / / ro,relatime - ext4 /dev/vda rw"
DATA_N1 = "2 1 254:0 /labs/a/places/n1 /var/lib/emp rw,relatime - ext4 /dev/vda rw"


def test_a_directory_is_seen_where_an_outer_mount_shows_it() -> None:
    written = Mount(DATA_N1)
    assert list(visible_at(table(ROOT), written)) == ["/labs/a/places/n1"]


def test_a_mount_above_hides_it() -> None:
    written = Mount(DATA_N1)
    assert list(visible_at(table(ROOT, "3 1 0:50 / /labs rw - tmpfs tmpfs rw"), written)) == []


def test_a_bind_below_the_hiding_mount_shows_it_again() -> None:
    written = Mount(DATA_N1)
    seen = table(
        ROOT,
        "3 1 0:50 / /labs rw - tmpfs tmpfs rw",
        "4 3 254:0 /labs/a /labs/mine ro - ext4 /dev/vda rw",
    )
    assert list(visible_at(seen, written)) == ["/labs/mine/places/n1"]


def test_a_part_of_what_is_written_is_seen_too() -> None:
    written = Mount(DATA_N1)
    seen = table("1 0 0:9 / / rw - tmpfs tmpfs rw", "2 1 254:0 /labs/a/places/n1/images /x ro - ext4 /dev/vda rw")
    assert list(visible_at(seen, written)) == ["/x"]


def test_another_directory_of_the_same_disk_is_not() -> None:
    written = Mount(DATA_N1)
    seen = table("1 0 0:9 / / rw - tmpfs tmpfs rw", "2 1 254:0 /labs/a/places/n10 /var/lib/emp rw - ext4 /dev/vda rw")
    assert list(visible_at(seen, written)) == []


def test_the_upper_of_two_mounts_at_one_place_is_reached() -> None:
    stacked = table(
        "1 0 254:0 / / rw - ext4 /dev/vda rw",
        "2 1 0:30 / /dev/shm rw - tmpfs a rw",
        "3 2 0:31 / /dev/shm rw - tmpfs b rw",
        "4 1 0:32 / /dev rw - tmpfs c rw",
    )
    assert covering(stacked, "/dev/shm/x").number == 4
    assert covering(stacked[:3], "/dev/shm/x").number == 3
    assert covering(stacked, "/devel").number == 1


def test_escaped_paths_and_read_only_file_systems_are_understood() -> None:
    mount = Mount(r"7 1 0:44 /a\040b /mnt/c\134d rw,relatime shared:1 master:2 - tmpfs none ro")
    assert (mount.root, mount.point, mount.kind, mount.writable) == ("/a b", r"/mnt/c\d", "tmpfs", False)
