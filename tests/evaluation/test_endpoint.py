"""What a strange or failing endpoint does to an evaluation: one clear line, never a traceback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.cli.commands import run
from thalweg.errors import ConfigError, UnavailableError
from thalweg.evaluation.endpoint import Client
from thalweg.evaluation.exam import Asking, ask

MODELS = b'{"data": [{"id": "m"}]}'
Serve = Callable[[bytes, bytes, int], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that answers GET and POST with fixed bytes; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def started(models: bytes, stream: bytes, status: int = 200) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: bytes) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                seen.append((self.path, self.headers.get("Authorization")))
                self.answer(models)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(stream)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    seen: list[tuple[str, str | None]] = []
    started.seen = seen  # type: ignore[attr-defined]
    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_answer_is_what_was_streamed(serve: Serve) -> None:
    stream = (
        b': hello\n\ndata: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
        b'data: {"choices":[{"delta":{"content":"round "}}]}\n\ndata: {"choices":[{"delta":{"content":"number"}}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
    )
    answer = ask(Client(serve(MODELS, stream)), Asking("m", 8), "x")
    assert (answer.text, answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (
        "round number",
        7,
        0,
        3,
    )


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b'data: {"choices":[]}\n\n', "ended a stream before [DONE]"),
        (b"data: soup\n\n", "'soup', which is no JSON object"),
        (b"data: [1]\n\n", "'[1]', which is no JSON object"),
        (b'data: {"error":{"message":"no room"}}\n\n', "no room"),
    ],
)
def test_streams_that_go_wrong(serve: Serve, stream: bytes, words: str) -> None:
    with pytest.raises(UnavailableError) as caught:
        ask(Client(serve(MODELS, stream)), Asking("m", 8), "x")
    assert words in caught.value.message


@pytest.mark.parametrize(("models", "status"), [(b"", 200), (b"{}", 200), (b'{"data": []}', 200), (b"busy", 503)])
def test_an_endpoint_without_models(serve: Serve, models: bytes, status: int) -> None:
    url = serve(models, b"", status)
    message = run("eval", "needle", "--url", url, "--context", "1k", ok=False)
    assert message.count("\n") == 1
    assert ("busy" if status == 503 else "lists no model") in message


def test_addresses_and_keys(serve: Serve) -> None:
    url = serve(MODELS, b"")
    for form in (url, f"{url}/v1", f"{url}/v1/", url.removeprefix("http://"), f"{url}/tenant/v1"):
        Client(form, "secret").get("/v1/models")
    paths, keys = zip(*serve.seen, strict=True)  # type: ignore[attr-defined]
    assert paths == ("/v1/models",) * 4 + ("/tenant/v1/models",)
    assert set(keys) == {"Bearer secret"}
    for wrong in ("http://", "http://host:99999", "ftp://host"):
        with pytest.raises(ConfigError):
            Client(wrong)
