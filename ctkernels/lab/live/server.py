"""The server of the live page."""

from __future__ import annotations

import ipaddress
import json
import secrets
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..._extras import require
from ...adapters import export_prometheus
from ...adapters.monitor import EditMonitor
from .report import LONGEST, LiveReport

LARGEST = 4 * LONGEST  # bytes of a request


class LiveServer:
    """Serves a :class:`LiveReport` until it is closed; see :func:`watch`."""

    def __init__(self, report: LiveReport, host: str, port: int) -> None:
        self.report = report
        self._attached = not report.monitor.on
        handler = type("Handler", (_Handler,), {"report": report, "names": _names(host)})
        try:
            self._server = ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            raise OSError(error.errno, f"cannot serve on {host}:{port}: {error.strerror}") from None
        self._server.daemon_threads = True
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        if self._attached:
            report.monitor.attach()
        self._thread.start()

    def close(self) -> None:
        """Stops serving, and detaches the monitor if the server attached it. May be called twice."""
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._attached:
            self.report.monitor.detach()

    def wait(self) -> None:
        """Serves until the process is interrupted."""
        self._thread.join()

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watch(monitor: EditMonitor, tokenizer: Any, host: str = "127.0.0.1", port: int = 8321) -> LiveServer:
    """Serves a page that shows edits by layer and head on the inputs of a model, as they arrive.

    The page shows the last inputs of ``monitor``, including text that is being generated, and has a box for typing a text.
    A thread of this process serves it; ``/metrics`` is for Prometheus, if prometheus-client is installed. There is no
    log-in: everyone who can reach the port, by default on this machine only, can read the inputs.

    Args:
        monitor: with a history; it is attached.
        tokenizer: of the monitor's model.
        host: address of the server.
        port: 0: a free one.

    Returns:
        the server: its ``url``, and ``close()``.

    Raises:
        ValueError: the monitor keeps no history.
        OSError: the port is taken.
        ImportError: Jinja2 or matplotlib is missing; the message names the extra.

    Examples:
        >>> with watch(EditMonitor(adapted, history=20), tokenizer, port=0) as server:
        ...     output = adapted(**inputs)
        >>> server.url
        'http://127.0.0.1:.../'
    """
    return LiveServer(LiveReport(monitor, tokenizer), host, port)


def _names(host: str) -> frozenset[str] | None:
    """The host names allowed in requests, against DNS rebinding; None: all, for an address that is not local."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return frozenset({host, "localhost", "127.0.0.1", "::1"}) if local else None


class _Handler(BaseHTTPRequestHandler):
    report: LiveReport
    names: frozenset[str] | None
    server_version = "ctkernels"
    protocol_version = "HTTP/1.0"  # a connection for each request, so that none outlives the server

    def do_GET(self) -> None:
        path, query = self._target()
        if path is None:
            return
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            sources = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'"
            policy = f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            self._answer(200, self.report.page(nonce), "text/html", {"Content-Security-Policy": policy})
        elif path == "/feed":
            pairs = (entry.rpartition(":") for entry in query.get("known", "").split(",") if entry)
            known = {key: int(version) for key, _, version in pairs if version.isascii() and version.isdigit()}
            self._answer(200, json.dumps(self.report.feed(query.get("dark") == "1", known)), "application/json")
        elif path == "/metrics":
            self._metrics()
        else:
            self._answer(404, "not found", "text/plain")

    def do_POST(self) -> None:
        path, _ = self._target()
        if path is None:
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST:
            self._answer(413, f"expected at most {LARGEST} bytes", "text/plain")
            return
        body = self.rfile.read(int(length))
        # forms on other sites can send requests of other types, but not of this one
        if path != "/texts" or self.headers.get_content_type() != "application/json":
            self._answer(404 if path != "/texts" else 415, "expected JSON for /texts", "text/plain")
            return
        try:
            text = json.loads(body)["text"]
            if not isinstance(text, str):
                raise ValueError("text must be text")
            self.report.read(text)
        except (ValueError, KeyError, TypeError) as error:
            self._answer(400, f'expected {{"text": "..."}}: {error}', "text/plain")
        else:
            self._answer(200, "{}", "application/json")

    def _target(self) -> tuple[str | None, dict[str, str]]:
        """The path and the query. Refuses a request for a host name that is not allowed, with None as its path."""
        url = urllib.parse.urlsplit(self.path)
        if (
            self.names is not None
            and urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname not in self.names
        ):
            self._answer(421, "served for this machine alone", "text/plain")
            return None, {}
        return url.path, dict(urllib.parse.parse_qsl(url.query))

    def _metrics(self) -> None:
        try:
            client = require("prometheus_client", "monitor", "metrics for Prometheus")
        except ImportError as error:
            self._answer(501, str(error), "text/plain")
            return
        registry = client.CollectorRegistry()
        export_prometheus(self.report.monitor, registry=registry)
        self._answer(200, client.generate_latest(registry).decode(), "text/plain; version=0.0.4")

    def _answer(self, status: int, text: str, kind: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind if "charset" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Logs nothing, as the page polls every second."""
