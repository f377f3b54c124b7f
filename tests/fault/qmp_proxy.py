"""Stands between an agent and QEMU's monitors; holds, drops or duplicates what a test names. Standard library only.

An agent is told of another QEMU than the one on PATH (its configuration's ``qemu``): a small script, written by
``tests.fault.qmp_faults``, which runs this file with the very descriptors and the user that QEMU would have::

    python qmp_proxy.py QEMU DIRECTORY ARGUMENTS...

It leaves a process behind that serves the monitors, makes QEMU listen elsewhere for that process, and becomes QEMU. So
the pid is QEMU's own, everything passes here from the first message on, and the process ends with its QEMU.

What to do is in ``DIRECTORY/rules.json``, a list of ``Rule`` fields, looked up anew for each message; without the file
everything passes. What passed is in ``DIRECTORY/log-PID.jsonl``, a line for each message and each thing done to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn, TypedDict

MONITORS = ("control", "cancel", "guard")
RULES = "rules.json"
HELD_POLL_S = 0.005
READ_BYTES = 1 << 16
LINE_LIMIT_BYTES = 1 << 24
_CHARDEV = re.compile(rf"socket,id=({'|'.join(MONITORS)}),fd=(\d+),(.*)")

Message = dict[str, Any]


class Rule(TypedDict):
    """What is done to the messages that fit. The first rule that fits, and is not used up, decides."""

    id: str
    action: str
    """``hold``: until the rule is gone (then it passes) or says ``drop``; ``drop``; ``duplicate``"""
    kind: str
    """``command`` (agent to QEMU), ``reply`` (the name is the command's), or ``event``"""
    name: str
    evm: str | None
    monitor: str | None
    fields: Message
    """what the message must hold, such as ``{"data": {"status": "completed"}}``"""
    skip: int
    """let so many that fit pass first; counted by each QEMU"""
    times: int | None
    """use it so often; None: always"""


class Entry(TypedDict):
    """A line of the log."""

    at_s: float
    """CLOCK_MONOTONIC, one for the whole machine"""
    evm: str
    monitor: str
    kind: str
    name: str
    what: str
    """``passed``, ``held``, ``dropped``, ``duplicated``"""
    rule: str | None
    message: Message


def contains(message: Any, wanted: Any) -> bool:
    """Whether ``message`` has all that ``wanted`` has, in objects of any depth."""
    if isinstance(wanted, dict):
        return isinstance(message, dict) and all(
            key in message and contains(message[key], value) for key, value in wanted.items()
        )
    return bool(message == wanted)


class Rules:
    """The rules file as one QEMU's proxy sees it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / RULES
        self._version: tuple[int, int] | None = None
        self._rules: list[Rule] = []
        self._fitted: Counter[str] = Counter()

    def current(self) -> list[Rule]:
        try:
            status = self._path.stat()
            version = (status.st_ino, status.st_mtime_ns)
            if version != self._version:
                self._rules, self._version = json.loads(self._path.read_text()), version
        except FileNotFoundError:
            self._rules, self._version = [], None
        return self._rules

    def decide(self, evm: str, monitor: str, kind: str, name: str, message: Message) -> Rule | None:
        """Return the rule for a message, and count it."""
        for rule in self.current():
            if (
                (rule["kind"], rule["name"]) == (kind, name)
                and rule["evm"] in (None, evm)
                and rule["monitor"] in (None, monitor)
                and contains(message, rule["fields"])
            ):
                self._fitted[rule["id"]] += 1
                turn = self._fitted[rule["id"]] - rule["skip"]
                if turn > 0 and (rule["times"] is None or turn <= rule["times"]):
                    return rule
        return None

    async def released(self, rule: Rule) -> bool:
        """Return once a held message may go on; False if it is to be dropped after all."""
        while True:
            now = next((one for one in self.current() if one["id"] == rule["id"]), None)
            if now is None or now["action"] != "hold":
                return now is None or now["action"] != "drop"
            await asyncio.sleep(HELD_POLL_S)  # a file tells nobody that it has changed


class Monitor:
    """One monitor of the QEMU; as there, one client after the other, and the next one waits for its greeting."""

    def __init__(self, evm: str, name: str, address: str, rules: Rules, log: Log) -> None:
        self.evm, self.name, self._address = evm, name, address
        self._rules, self._log = rules, log
        self._one = asyncio.Lock()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._one:
            try:
                inner_reader, inner_writer = await asyncio.open_unix_connection(self._address, limit=LINE_LIMIT_BYTES)
                await Conversation(self, writer, inner_writer).run(reader, inner_reader)
                await _close(inner_writer)
            except OSError:
                pass  # QEMU has ended
            finally:
                await _close(writer)

    def decide(self, kind: str, name: str, message: Message) -> Rule | None:
        return self._rules.decide(self.evm, self.name, kind, name, message)

    async def released(self, rule: Rule) -> bool:
        return await self._rules.released(rule)

    def note(self, kind: str, name: str, what: str, rule: Rule | None, message: Message) -> None:
        entry: Entry = {
            "at_s": time.monotonic(), "evm": self.evm, "monitor": self.name, "kind": kind, "name": name, "what": what,
            "rule": rule["id"] if rule else None, "message": message,
        }  # fmt: skip
        self._log.write(entry)


class Conversation:
    """One client's connection and the one to QEMU that is made for it."""

    def __init__(self, monitor: Monitor, client: asyncio.StreamWriter, qemu: asyncio.StreamWriter) -> None:
        self._monitor, self._client, self._qemu = monitor, client, qemu
        self._asked: dict[str, str] = {}
        self._unheard: Counter[str] = Counter()
        """replies to the second copy of a duplicated command: the client hears one"""
        self._held: set[asyncio.Task[None]] = set()

    async def run(self, client: asyncio.StreamReader, qemu: asyncio.StreamReader) -> None:
        """Return when either end has hung up; what is still held is then lost."""
        ways = {asyncio.create_task(self._commands(client)), asyncio.create_task(self._answers(qemu))}
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*ways, *self._held):
                task.cancel()
            await asyncio.gather(*ways, *self._held, return_exceptions=True)

    async def _commands(self, reader: asyncio.StreamReader) -> None:
        async for message, text in _objects(reader):
            name = str(message.get("execute") or message.get("exec-oob"))
            self._asked[_key(message)] = name
            await self._pass("command", name, message, text, self._qemu)

    async def _answers(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if "event" in message:
                await self._pass("event", message["event"], message, line, self._client)
            elif "QMP" in message:
                await self._pass("event", "QMP", message, line, self._client)
            elif self._unheard[_key(message)]:
                self._unheard[_key(message)] -= 1
            else:
                await self._pass("reply", self._asked.get(_key(message), ""), message, line, self._client)

    async def _pass(self, kind: str, name: str, message: Message, text: bytes, to: asyncio.StreamWriter) -> None:
        rule = self._monitor.decide(kind, name, message)
        action = rule["action"] if rule else "pass"
        if rule and action == "hold":
            self._monitor.note(kind, name, "held", rule, message)
            held = asyncio.create_task(self._later(rule, kind, name, message, text, to))
            self._held.add(held)
            held.add_done_callback(self._held.discard)
            return
        if rule and action == "drop":
            self._monitor.note(kind, name, "dropped", rule, message)
            return
        if rule and action == "duplicate":
            self._monitor.note(kind, name, "duplicated", rule, message)
            to.write(text)
            if kind == "command":
                self._unheard[_key(message)] += 1
        self._monitor.note(kind, name, "passed", rule, message)
        to.write(text)
        await to.drain()

    async def _later(
        self, rule: Rule, kind: str, name: str, message: Message, text: bytes, to: asyncio.StreamWriter
    ) -> None:
        passes = await self._monitor.released(rule)
        self._monitor.note(kind, name, "passed" if passes else "dropped", rule, message)
        if passes:
            to.write(text)


class Log:
    """Appends to the log of this QEMU, where the directory is there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, entry: Entry) -> None:
        with contextlib.suppress(FileNotFoundError), self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


async def _objects(reader: asyncio.StreamReader) -> AsyncIterator[tuple[Message, bytes]]:
    """Yield JSON objects, which may follow each other with nothing between them, and their text."""
    unread = ""
    while data := await reader.read(READ_BYTES):
        unread = (unread + data.decode()).lstrip()
        while unread:
            try:
                message, end = json.JSONDecoder().raw_decode(unread)
            except ValueError:
                break  # the rest is to come
            yield message, unread[:end].encode() + b"\n"
            unread = unread[end:].lstrip()


def _key(message: Message) -> str:
    return json.dumps(message.get("id"))


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def serve(tell: int, qemu: int, directory: Path, evm: str, monitors: list[str]) -> None:
    """Serve until the process ``qemu`` has ended; close ``tell`` once served.

    Each of ``monitors`` is NAME:DESCRIPTOR:ABSTRACT-ADDRESS.
    """
    over = asyncio.Event()
    try:
        asyncio.get_running_loop().add_reader(os.pidfd_open(qemu), over.set)
    except ProcessLookupError:
        return
    rules, log = Rules(directory), Log(directory / f"log-{qemu}.jsonl")
    for given in monitors:
        name, descriptor, address = given.split(":")
        monitor = Monitor(evm, name, f"\0{address}", rules, log)
        await asyncio.start_unix_server(monitor.serve, sock=socket.socket(fileno=int(descriptor)))
    os.close(tell)
    await over.wait()


def become_qemu(qemu: str, directory: str, arguments: list[str]) -> NoReturn:
    """Put the proxy between this QEMU's monitors and their clients, if it has any; then be QEMU."""
    monitors, outer_ones = [], []
    for index, argument in enumerate(arguments):
        if found := _CHARDEV.fullmatch(argument):
            name, outer, rest = found[1], int(found[2]), found[3]
            inner = socket.socket(socket.AF_UNIX)
            inner.bind("")  # the kernel picks an abstract name, in the network namespace of this place
            inner.listen()
            inner.set_inheritable(True)
            monitors.append(f"{name}:{outer}:{inner.getsockname()[1:].decode()}")
            arguments[index] = f"socket,id={name},fd={inner.fileno()},{rest}"
            outer_ones.append(outer)
            inner.detach()
    if monitors:
        evm = next(word for word in arguments if word.startswith("guest=")).removeprefix("guest=").partition(",")[0]
        _leave_behind([str(os.getpid()), directory, evm, *monitors], outer_ones)
    for descriptor in outer_ones:
        os.close(descriptor)
    os.execv(qemu, [qemu, *arguments])


def _leave_behind(words: list[str], its: list[int]) -> None:
    """Start the serving process with the descriptors ``its``, and return when it serves.

    It is a grandchild, so that QEMU has no child, and has not QEMU's name in its environment.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:  # QEMU's taps among them
            if number > 2 and number not in (*its, tell):
                with contextlib.suppress(OSError):
                    os.close(number)
        os.set_inheritable(tell, True)
        environment = {name: value for name, value in os.environ.items() if name != "EMP_LAUNCH"}
        words = [sys.executable, "-I", "-S", __file__, "--serve", str(tell), *words]
        os.execve(words[0], words, environment)
    finally:
        os._exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        asyncio.run(serve(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], sys.argv[6:]))
    else:
        become_qemu(sys.argv[1], sys.argv[2], sys.argv[3:])
