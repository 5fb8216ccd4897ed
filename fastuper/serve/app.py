"""The addresses of the page: the page itself, its files, and the JSON endpoint."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastuper.serve.files import Uploads, removed_after
from fastuper.serve.service import RefusedError, Service, plain_name

SWEEP_SECONDS = 60
"""The time between two sweeps of old results."""

UPLOADS = ("/api/photo", "/gradio_api/upload")
"""The addresses that take photos."""

LARGEST_MESSAGE = 1 << 20
"""The limit on the body of a request to another address, and on what surrounds a photo, in bytes."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "worker-src 'self' blob:",
        "font-src 'self' data:",
        "frame-ancestors 'self'",
        "form-action 'self'",
    )
)
"""The content security policy: a browser loads nothing for the page from another machine."""

_FETCHING = re.compile(r"/(file|proxy)=\s*https?:", re.IGNORECASE)


def build_app(service: Service, folder: Path, uploads: Uploads) -> Any:
    """Return the FastAPI application, without the page. It answers behind a `Guard`, which limits what it is sent.

    Args:
        service: runs the models.
        folder: the folder of temporary files, which exists.
        uploads: the photos that the page was sent.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import FileResponse, JSONResponse, Response

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(service, uploads))
        yield
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping

    # FastAPI's own pages of documentation load scripts of other machines.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return JSONResponse({"error": error.message}, error.status)

    app.add_exception_handler(RefusedError, refused)
    answer_failures(app)

    async def models(_: Request) -> Response:
        names = service.models.names
        return JSONResponse({name: "parse" if name in service.models.parsing else "segment" for name in names})

    async def photo(request: Request) -> Response:
        name = plain_name(request.query_params.get("name", "photo"))
        model = request.query_params.get("model", service.models.names[0])
        service.check_model(model)
        service.queue.check()
        suffix = Path(name).suffix if len(Path(name).suffix) <= 20 else ""
        with removed_after(folder / f"{secrets.token_hex(8)}{suffix}") as path:
            await _receive(request, path)
            answer = await service.answer(path, name, model)
        base = str(request.base_url).rstrip("/")
        files = {ending: base + address for ending, address in answer.result["files"].items()}
        return JSONResponse(answer.result | {"files": files})

    async def result(request: Request) -> Response:
        path = service.results.path(request.path_params["key"], request.path_params["name"])
        if path is None:
            raise RefusedError("this result is no longer there: run the photo again", 404)
        return FileResponse(path)

    app.add_route("/api/models", models, methods=["GET"])
    app.add_route("/api/photo", photo, methods=["POST"])
    app.add_route("/results/{key}/{name}", result, methods=["GET"])
    return app


def answer_failures(app: Any) -> None:
    """Make an application answer with one line when the disk is full, and with nothing when the client has left."""
    from fastapi import Request
    from fastapi.responses import PlainTextResponse, Response
    from starlette.requests import ClientDisconnect

    async def full(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"a temporary file failed: {getattr(error, 'strerror', None) or error}", 500)

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=400)

    app.add_exception_handler(OSError, full)
    app.add_exception_handler(ClientDisconnect, left)


async def _receive(request: Any, path: Path) -> None:
    """Write the body of a request to a file.

    Raises:
        RefusedError: the body is empty, or the disk is full.
    """
    size = 0
    try:
        with path.open("wb") as file:
            async for block in request.stream():
                size += file.write(block)
    except OSError as error:
        raise RefusedError(f"the photo cannot be stored: {error.strerror}", 500) from None
    if size == 0:
        raise RefusedError("the request has no body: send the photo's file, as curl --data-binary @photo.jpg does", 400)


async def _sweep(service: Service, uploads: Uploads) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        await asyncio.to_thread(service.results.sweep)
        await asyncio.to_thread(uploads.sweep)


class Guard:
    """ASGI middleware: adds the content security policy, and refuses what could harm this machine.

    Refused are Gradio's addresses that fetch from a given address; bodies of requests that are too large, alone or
    together; and, on the loopback, requests of other sites' pages. A page of another site could otherwise reach the
    server through the user's browser, under a name of its own that leads to 127.0.0.1.

    Args:
        app: the application.
        uploads: the photos that the page was sent; room is made before another arrives.
        loopback: the server is bound to the loopback.
        largest: the limit on the size of a photo's file in bytes. Photos that arrive at the same time may have twice
            as many.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], uploads: Uploads, *, loopback: bool, largest: int) -> None:
        self.app = app
        self.uploads = uploads
        self.loopback = loopback
        self.largest = largest
        self._arriving = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"], dict(scope["headers"])
        try:
            self._check_address(path, headers)
            length = self._length(path, headers)
        except RefusedError as error:
            body = json.dumps({"error": error.message}) if path.startswith("/api/") else error.message
            kind = b"application/json" if path.startswith("/api/") else b"text/plain"
            await send({"type": "http.response.start", "status": error.status, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": f"{body}\n".encode()})
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", POLICY.encode("ascii")),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        self._arriving += length
        try:
            if path in UPLOADS:
                await asyncio.to_thread(self.uploads.sweep)
            await self.app(scope, receive, send_with_policy)
        finally:
            self._arriving -= length

    def _check_address(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = not self.loopback or (_host(host) in LOOPBACK and (not origin or origin.partition("://")[2] == host))
        if not own or _FETCHING.search(path):
            raise RefusedError("this page answers requests of this machine alone", 403)

    def _length(self, path: str, headers: dict[bytes, bytes]) -> int:
        """Return the length of a request's body in bytes, which the server checks.

        Raises:
            RefusedError: the length is not stated, or there is no room for it.
        """
        if b"transfer-encoding" in headers:
            raise RefusedError("the request does not state the length of its body: send Content-Length", 411)
        length = int(headers.get(b"content-length", b"0"))
        if path not in UPLOADS:
            if length > LARGEST_MESSAGE:
                raise RefusedError(f"the request has more than {LARGEST_MESSAGE:,} bytes", 413)
        elif length > self.largest + (LARGEST_MESSAGE if path != UPLOADS[0] else 0):
            raise RefusedError(f"the photo's file has more than {self.largest:,} bytes", 413)
        elif self._arriving + length > 2 * self.largest:
            raise RefusedError("too many photos arrive at once: try again in a moment", 503)
        return length


def _host(address: str) -> str:
    """Return the name in `name:port` or `[name]:port`."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0]
