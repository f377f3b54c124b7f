"""Plays the kubelet for pods of an EVM: an HTTP GET to each, every second, that has one second to be answered.

It probes from the network namespace of the lab's client, for the kubelet inside the EVM would not notice a pod that the
network has lost. What counts follows Kubernetes ("Configure Liveness, Readiness and Startup Probes"): a connection for
each probe, and any status from 200 to 399 is success.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from emp.lab.kernel import CLONE_NEWNET, join_namespace
from emp.model.errors import HostError

PERIOD_S = 1.0
TIMEOUT_S = 1.0
PORT = 8080
PATH = "/healthz"


@dataclass(frozen=True)
class Probe:
    """One probe of one pod."""

    pod: str
    began_s: float
    """on the monotonic clock"""
    took_s: float
    problem: str | None
    """why it failed; None: it was answered in time"""


def probe(pod: str, address: str, *, port: int = PORT) -> Probe:
    """Ask once, as the kubelet does. Every failure is in the answer; nothing is raised."""
    began_s = time.monotonic()
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", PATH, headers={"User-Agent": "kube-probe/1.32", "Connection": "close"})
        status = connection.getresponse().status
        problem = None if 200 <= status < 400 else f"HTTP status {status}"
    except (OSError, http.client.HTTPException) as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    took_s = time.monotonic() - began_s
    if problem is None and took_s > TIMEOUT_S:  # the timeout of the socket is for each of its calls alone
        problem = f"answered after {took_s:.2f} s"
    return Probe(pod, began_s, took_s, problem)


class KubeletProber:
    """``with KubeletProber({"web-0": "10.77.1.6"}, namespace=...) as kubelet:`` probes until the block ends.

    ``namespace``: file of the network namespace to probe from; None: where the caller is. Raises HostError if it cannot
    be entered. ``probes`` can be read at any time.
    """

    def __init__(self, pods: Mapping[str, str], *, namespace: str | None, port: int = PORT) -> None:
        self._namespace = namespace
        self._port = port
        self._done = threading.Event()
        self._entered = threading.Barrier(len(pods) + 1)
        self._failure: OSError | None = None
        self._probes: list[Probe] = []
        self._threads = [threading.Thread(target=self._run, args=pod, name=f"kubelet {pod[0]}") for pod in pods.items()]

    @property
    def probes(self) -> tuple[Probe, ...]:
        """What has been asked and answered, or has failed, so far."""
        return tuple(self._probes)

    def failures(self, pod: str | None = None) -> list[Probe]:
        """Return the probes that failed, of one pod or of all."""
        return [each for each in self.probes if each.problem and pod in (None, each.pod)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self._entered.wait()
        if self._failure is not None:
            self._stop()
            raise HostError(f"cannot enter the network of the prober: {self._failure}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _run(self, pod: str, address: str) -> None:
        try:
            if self._namespace is not None:
                join_namespace(self._namespace, CLONE_NEWNET)  # of this thread alone
        except OSError as error:
            self._failure = error
        self._entered.wait()
        due_s = time.monotonic()
        while not self._done.wait(max(0.0, due_s - time.monotonic())):
            self._probes.append(probe(pod, address, port=self._port))
            due_s = max(due_s + PERIOD_S, time.monotonic())
