"""The addresses of the page: the page itself, its files, and the JSON endpoint."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastuper.serve.files import removed_after, size_limit
from fastuper.serve.service import RefusedError, Service, plain_name

SWEEP_SECONDS = 60
"""The time between two sweeps of old results."""

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


def build_app(service: Service, folder: Path) -> Any:
    """Return the FastAPI application, without the page.

    Args:
        service: runs the models.
        folder: the folder of temporary files, which exists.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import FileResponse, JSONResponse, Response

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(service))
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
            await _receive(request, path, size_limit(service.max_pixels))
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


async def _receive(request: Any, path: Path, limit: int) -> None:
    """Write the body of a request to a file.

    Raises:
        RefusedError: the body is empty or too large, or the disk is full.
    """
    size = 0
    try:
        with path.open("wb") as file:
            async for block in request.stream():
                size += len(block)
                if size > limit:
                    raise RefusedError(f"the photo's file has more than {limit:,} bytes", 413)
                file.write(block)
    except OSError as error:
        raise RefusedError(f"the photo cannot be stored: {error.strerror}", 500) from None
    if size == 0:
        raise RefusedError("the request has no body: send the photo's file, as curl --data-binary @photo.jpg does", 400)


async def _sweep(service: Service) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        await asyncio.to_thread(service.results.sweep)


class Guard:
    """ASGI middleware: adds the content security policy, and refuses requests that lead to other machines.

    These are Gradio's addresses that fetch from a given address; and, on the loopback, requests of other sites' pages.

    A page of another site could otherwise reach the server through the user's browser, under a name of its own that
    leads to 127.0.0.1.

    Args:
        app: the application.
        loopback: the server is bound to the loopback.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], loopback: bool) -> None:
        self.app = app
        self.loopback = loopback

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own = not self.loopback or self._is_own(dict(scope["headers"]))
        if not own or _FETCHING.search(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this page answers requests of this machine alone\n"})
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

        await self.app(scope, receive, send_with_policy)

    def _is_own(self, headers: dict[bytes, bytes]) -> bool:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        return _host(host) in LOOPBACK and (not origin or origin.partition("://")[2] == host)


def _host(address: str) -> str:
    """Return the name in `name:port` or `[name]:port`."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0]
