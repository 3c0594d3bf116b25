"""A server that says how far along a task is: images and the task in, progress out, as SOLE-R1
(github.com/philipmit/sole-r1-model) offers it to a robot's trainer. HTTP and JSON, on the standard library.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vrlt_fast.config import Config
from vrlt_fast.errors import ConfigError, DataError, Problem
from vrlt_fast.serve_model import Batches, ProgressModel, question_of

LOG = logging.getLogger("vrlt_fast")
MOST_BODY = 32 << 20
"""Bytes of a request's body."""
_CONNECTIONS = 32
_READ_S = 30.0
_END_S = 10.0


class _Refused(Exception):
    """A reply of this status with this error, before or instead of an answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class ProgressServer(ThreadingHTTPServer):
    """``POST /progress`` and ``GET /health`` on an address.

    Args:
        token: that requests must carry as ``Authorization: Bearer TOKEN``; empty: none.
        timeout_s: seconds that an answer may take.
        read_s: seconds that a request may take to arrive.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        host: str,
        port: int,
        model: ProgressModel,
        *,
        token: str = "",
        timeout_s: float = 120.0,
        read_s: float = _READ_S,
    ):
        self.address_family = _family(host)
        self.model, self.token, self.timeout_s, self.read_s = model, token.encode(), timeout_s, read_s
        self.batches = Batches(model.answer)
        self._slots = threading.Semaphore(_CONNECTIONS)
        self._reading: dict[socket.socket, float] = {}
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            with suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        self._reading[request] = time.monotonic() + self.read_s
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._reading.pop(request, None)
            self._slots.release()

    def has_read(self, request: socket.socket) -> None:
        """The request is here: its time to arrive doesn't count any more."""
        self._reading.pop(request, None)

    def service_actions(self) -> None:
        """End connections whose requests don't arrive in time. A socket's own timeout is one of each piece."""
        now = time.monotonic()
        for request, until in list(self._reading.items()):
            if until < now:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        LOG.debug("a connection to the progress server failed", exc_info=True)

    def server_close(self) -> None:
        """Stop listening, give what has begun a moment, and end the thread of the model."""
        super().server_close()
        self.batches.close()
        until = time.monotonic() + _END_S
        for _ in range(_CONNECTIONS):
            self._slots.acquire(timeout=max(until - time.monotonic(), 0.0))


class _Handler(BaseHTTPRequestHandler):
    server: ProgressServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vrlt", ""
    timeout = _READ_S

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, {"status": "ok"})
        else:
            self.send_error(404, "there are POST /progress and GET /health")

    def do_POST(self) -> None:
        try:
            question = question_of(self._body())
            answer = self.server.batches.ask(self.server.model.prompt(question), self.server.timeout_s)
            self._reply(200, {"progress": answer.progress, "text": answer.text})
        except _Refused as error:
            self.send_error(error.status, str(error))
        except DataError as error:
            p = error.problems[0]
            told = {"code": p.code, "message": p.what, "where": p.where, "why": p.why, "fix": p.fix}
            self._reply(400, {"error": {name: text for name, text in told.items() if text}})
        except queue.Full:
            self.send_error(503, "too many requests, or the server ends")
        except TimeoutError:
            self.send_error(504, f"no answer within {self.server.timeout_s:g} s")
        except ConnectionError:
            raise
        except Exception:
            LOG.exception("the progress server failed")
            self.send_error(500, "internal error, which the server's log explains")

    def _body(self) -> bytes:
        """Raises _Refused for what isn't read, or isn't here in time."""
        length = self._length()
        try:
            self._check_head()
        except _Refused:
            self._read(length)  # a connection closed on unread bytes takes the reply with it
            raise
        body = self._read(length)
        self.server.has_read(self.connection)
        if len(body) < length:
            raise _Refused(408, "the request didn't arrive in time")
        return body

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _Refused(411, "needs a Content-Length")
        if int(text) > MOST_BODY:
            raise _Refused(413, f"the body has more than {MOST_BODY} bytes")
        return int(text)

    def _check_head(self) -> None:
        if self.server.token:
            given = self.headers.get("Authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, b"Bearer " + self.server.token):
                raise _Refused(401, "needs the header Authorization: Bearer TOKEN")
        if self.path != "/progress":
            raise _Refused(404, "there are POST /progress and GET /health")
        # a page in a browser may send other types to localhost without asking
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "needs Content-Type: application/json")

    def _read(self, length: int) -> bytes:
        try:
            return self.rfile.read(length)
        except TimeoutError:
            raise _Refused(408, "the request didn't arrive in time") from None

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.close_connection = True
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class calls, too, for requests that aren't HTTP or have another method."""
        self._reply(code, {"error": {"message": message or "the request isn't understood"}})

    def log_message(self, format: str, *args: Any) -> None:
        LOG.debug("progress server: " + format, *args)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def check_address(host: str, token: str) -> None:
    """Raises ConfigError C04 for an address that others can reach without a token."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and not token:
        what, fix = (
            f"{host} can be reached from other machines, so a token is needed",
            "export VRLT_TOKEN=$(openssl rand -hex 16)",
        )
        raise ConfigError(Problem("VRLT-C04", what, "--host", fix=fix))


def serve(config: Config, host: str, port: int, token: str, ready: Callable[[str], None]) -> None:
    """Answer until SIGINT or SIGTERM; then end what has begun. ``ready`` is called with the URL once it listens.

    Raises:
        ConfigError: C02 the address can't be used, C04 as :func:`check_address`.
        VrltError: as :class:`ProgressModel`.
    """
    check_address(host, token)
    try:
        socket.create_server((host, port), family=_family(host)).close()  # known before the model is loaded
        server = ProgressServer(host, port, ProgressModel(config), token=token)
    except OSError as error:
        why, fix = error.strerror or str(error), "give another one with --port or --host"
        raise ConfigError(Problem("VRLT-C02", f"can't listen on {host} port {port}", "--port", why, fix)) from None
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=server.serve_forever, name="connections")
    thread.start()
    try:
        ready(f"http://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}")
        ended.wait()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for number, handler in before.items():
            signal.signal(number, handler)
