"""A chat-completion endpoint on this machine that says what a test tells it."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = tuple[int, Any]


class Server:
    """`answer(request body, number of requests before)` gives status and JSON (or bytes); `requests` holds what came."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Answer] = lambda body, number: (200, said("1"))
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.headers: dict[str, str] = {}
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                status, found = server.answer(body, number)
                data = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that would not wait
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def said(text: str | None, tokens: list[tuple[str, dict[str, float]]] | None = None) -> dict[str, Any]:
    """A chat completion; `tokens` are (text, probabilities of the alternatives)."""
    listed = [
        {
            "token": word,
            "logprob": math.log(top[word]),
            "top_logprobs": [{"token": other, "logprob": math.log(p)} for other, p in top.items()],
        }
        for word, top in tokens or ()
    ]
    choice = {"message": {"role": "assistant", "content": text}, "logprobs": {"content": listed} if tokens else None}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("PREFOPT_API_KEY", raising=False)
    made = Server()
    yield made
    made.close()


@pytest.fixture
def reply() -> Callable[..., dict[str, Any]]:
    return said
