"""One POST request with limits that hold: on all of its time, on the size of the reply, on where it goes."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

LARGEST = 1 << 20
"""Bytes of a reply that are accepted."""
_AGAIN = (408, 429)


class Address(NamedTuple):
    """``path`` without a slash at its end; ``port`` None: the scheme's own."""

    https: bool
    host: str
    port: int | None
    path: str


class HttpError(Exception):
    """A request without a usable reply. ``kind``: "timeout" or "http"; ``again``: whether a further try makes sense;
    ``retry_after``: seconds that the server asks to wait.
    """

    def __init__(self, what: str, kind: str = "http", *, again: bool = False, retry_after: float | None = None):
        super().__init__(what)
        self.kind, self.again, self.retry_after = kind, again, retry_after


def post(address: Address, path: str, body: bytes, headers: Mapping[str, str], timeout: float) -> bytes:
    """The body of a reply 200 to a JSON text. No proxy, no redirect, no compression, and a connection of its own.

    Args:
        timeout: seconds for everything from the connection to the last byte.

    Raises:
        HttpError: anything else. Its text has neither headers nor the server's words.
    """
    until = time.monotonic() + timeout
    connection = _connection(address, timeout)
    late = threading.Event()
    try:
        connection.connect()
        open_socket = connection.sock

        def end() -> None:
            late.set()
            _shut(open_socket)

        # a socket's own timeout is one of each piece that arrives
        timer = threading.Timer(max(until - time.monotonic(), 0.001), end)
        timer.daemon = True
        timer.start()
        try:
            sent = {**headers, "Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
            connection.request("POST", address.path + path, body, sent)
            reply = _read(connection.getresponse())
        finally:
            timer.cancel()
        if late.is_set():  # what ends without a length looks complete
            raise TimeoutError
        return reply
    except (OSError, http.client.HTTPException, ValueError, HttpError) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise HttpError(f"no reply within {timeout:g} s", "timeout", again=True) from None
        if isinstance(error, HttpError):
            raise
        raise HttpError(f"the connection failed ({type(error).__name__})", again=True) from None
    finally:
        connection.close()


def _connection(address: Address, timeout: float) -> http.client.HTTPConnection:
    if address.https:
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(address.host, address.port, timeout=timeout, context=context)
    return http.client.HTTPConnection(address.host, address.port, timeout=timeout)


def _shut(open_socket: socket.socket) -> None:
    """End what another thread waits for. Of a TLS socket as well, past its own shutdown, which would take its state."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(open_socket, socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse) -> bytes:
    status = response.status
    if 300 <= status < 400:
        raise HttpError(f"the server redirects (status {status}), which isn't followed")
    if status != 200:
        again = status in _AGAIN or status >= 500
        raise HttpError(f"the server replied with status {status}", again=again, retry_after=_retry_after(response))
    body = response.read(LARGEST + 1)
    if len(body) > LARGEST:
        raise HttpError(f"the reply has more than {LARGEST} bytes")
    if response.length:  # fewer bytes than were announced
        raise HttpError("the connection ended within the reply", again=True)
    return body


def _retry_after(response: http.client.HTTPResponse) -> float | None:
    text = response.getheader("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None
