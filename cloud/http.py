"""A small HTTP port for people and monitors: /metrics and /health."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from isthmus.protocol.address import address_fault
from isthmus.protocol.errors import ServiceError


class StatusServer:
    """Answers GET /metrics and GET /health on its own thread.

    Args:
        address: "HOST:PORT"; port 0 takes a free one, see `port` afterwards.
        metrics: gives the text of /metrics.
        health: gives the fields of /health; "status" other than "ok" answers 503.

    Raises:
        ServiceError: the address is none, or taken.
    """

    def __init__(self, address: str, metrics: Callable[[], str], health: Callable[[], dict[str, Any]]) -> None:
        host, port = host_port(address)

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, "text/plain; version=0.0.4; charset=utf-8", metrics())
                elif self.path == "/health":
                    fields = health()
                    status = 200 if fields.get("status") == "ok" else 503
                    self._answer(status, "application/json", json.dumps(fields) + "\n")
                else:
                    self._answer(404, "text/plain", "try /metrics or /health\n")

            def _answer(self, status: int, kind: str, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise ServiceError(f"cannot listen on {address}: {error.strerror}", "choose another --http port") from error
        self.port: int = self._server.server_address[1]
        self.address = f"{address.rpartition(':')[0]}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def host_port(address: str, option: str = "--http") -> tuple[str, int]:
    """Host and port out of "HOST:PORT"; an IPv6 host stands in brackets.

    Args:
        option: that named it.

    Raises:
        ServiceError: it is something else.
    """
    host, _, port = address.rpartition(":")
    if host == "*" or address_fault(f"tcp://{address}", listening=True):
        remedy = "write HOST:PORT, such as 127.0.0.1:9090 or [::1]:9090"
        raise ServiceError(f"{address!r} is no address for {option}", remedy)
    return host.strip("[]"), int(port)
