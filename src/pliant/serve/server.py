"""A listening socket and the loop behind it; SIGTERM drains."""

from __future__ import annotations

import ipaddress
import signal
import socket
from typing import Any

import uvicorn

from pliant.errors import PliantError

DRAIN_SECONDS = 30


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; port 0 takes a free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise PliantError(f"cannot listen at {host} port {port}: {error}") from None


def url_of(listening: socket.socket) -> str:
    """Where clients find it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def serve(app: Any, listening: socket.socket, drain_seconds: int = DRAIN_SECONDS) -> None:
    """Serve until SIGTERM or SIGINT: then take no more connections, finish what runs, return.

    After `drain_seconds` what still runs is cancelled. After SIGINT it raises KeyboardInterrupt.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_seconds,
    )
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
