"""A server on this machine, for the tests of rewards behind HTTP: it answers as it is told to."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server says; a dict or list is sent as JSON."""

    content: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    """Seconds between two bytes of the body."""

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    content: Any


@dataclass
class FakeServer:
    """`answer` is asked for each request, in as many threads as there are; `requests` are those that came."""

    url: str
    requests: list[Request]
    answer: Callable[[Request], Answer]


@contextmanager
def serve() -> Iterator[FakeServer]:
    """A server on a free port."""
    fake = FakeServer("", [], lambda request: Answer(status=404))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Request(self.path, dict(self.headers), content)
            fake.requests.append(request)
            answer = fake.answer(request)
            self.send_response(answer.status)
            for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if not answer.pause:
                self.wfile.write(answer.body)
            for byte in answer.body if answer.pause else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(answer.pause)

        def log_message(self, *args: object) -> None:
            pass

    class QuietServer(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:  # of a client that has gone, as it should
            pass

    server = QuietServer(("localhost", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.url = f"http://localhost:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
