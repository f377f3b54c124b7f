"""The kubelet of the tests: it must see a pod fail, in each way in which one can."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from emp.lab.kubelet_prober import KubeletProber, probe
from emp.model.errors import HostError

HERE = "127.0.0.1"


@contextmanager
def pod(*, status: int = 200, delay_s: float = 0.0) -> Iterator[int]:
    """An HTTP server like a pod's; yields its port."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            released.wait(delay_s)
            self.send_response(status if self.path == "/healthz" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Say nothing."""

    server = ThreadingHTTPServer((HERE, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("status", [200, 302, 399])
def test_what_kubernetes_takes_for_success(status: int) -> None:
    with pod(status=status) as port:
        assert probe("web-0", HERE, port=port).problem is None


@pytest.mark.parametrize("status", [400, 404, 503])
def test_a_bad_status_is_a_failure(status: int) -> None:
    with pod(status=status) as port:
        assert probe("web-0", HERE, port=port).problem == f"HTTP status {status}"


def test_an_answer_after_a_second_is_a_failure() -> None:
    with pod(delay_s=30.0) as port:
        found = probe("web-0", HERE, port=port)
    assert "timed out" in (found.problem or "")
    assert 1.0 <= found.took_s < 10.0


def test_a_pod_that_is_not_there_is_a_failure() -> None:
    with socket.socket() as unused:
        unused.bind((HERE, 0))
        assert "refused" in (probe("web-0", HERE, port=unused.getsockname()[1]).problem or "")


def test_each_pod_is_probed_until_the_end() -> None:
    with pod() as port, KubeletProber({"web-0": HERE, "web-1": HERE}, namespace=None, port=port) as kubelet:
        deadline = time.monotonic() + 30.0
        while len(kubelet.probes) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
    seen = kubelet.probes
    assert {each.pod for each in seen} == {"web-0", "web-1"}
    assert kubelet.failures() == []
    began = [each.began_s for each in seen if each.pod == "web-0"]
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(began))
    assert kubelet.probes == seen


def test_a_network_that_is_not_there_is_said() -> None:
    with pytest.raises(HostError, match="network of the prober"), KubeletProber({"web-0": HERE}, namespace="/gone"):
        pass
