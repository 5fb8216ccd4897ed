"""Runs the page until Ctrl-C."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

from fastuper.inference.loading import choose_device
from fastuper.io.messages import one_line
from fastuper.serve.app import LOOPBACK, Guard, answer_failures, build_app
from fastuper.serve.files import ResultFiles, Uploads, size_limit, temporary_folder
from fastuper.serve.models import Models
from fastuper.serve.service import Service


class ServeError(RuntimeError):
    """The page cannot start; the message is one line."""


def check_packages() -> None:
    """Raise ServeError if a package of the page is missing."""
    missing = [name for name in ("gradio", "fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ServeError(f"the page needs {' and '.join(missing)}: pip install 'fastuper[serve]'")


def serve(
    sources: Sequence[str],
    *,
    host: str,
    port: int,
    device: str,
    dtype: str,
    max_pixels: int,
    queue: int,
    notify: Callable[[str], None],
    ready: Callable[[str], None],
) -> None:
    """Run the page until the process is interrupted.

    Args:
        sources: the models; none for the package's own.
        host: the name or address to listen on.
        port: the port; 0 for any free port.
        device: the name of the device.
        dtype: the name of the floating-point type.
        max_pixels: the limit on a photo's width x height.
        queue: the number of photos that may wait.
        notify: is called with a line about a model, or about the address.
        ready: is called with the page's address, just before it answers.

    Raises:
        ServeError: a package is missing, the address cannot be used, or no temporary folder can be made.
        LoadError: a model cannot be loaded.
    """
    check_packages()
    with _bind(host, port) as listener:  # a port in use is known before a model is loaded
        models = Models(sources, choose_device(device), dtype, notify)
        loopback = host in LOOPBACK
        if not loopback:
            notify(f"everyone who can reach {host} can use this page: it asks for no password")
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(temporary_folder())
                for name in ("examples", "uploads", "results"):
                    (folder / name).mkdir()
            except OSError as error:
                raise ServeError(f"cannot make a temporary folder: {one_line(error)}") from None
            service = Service(models, ResultFiles(folder / "results"), max_pixels=max_pixels, waiting=queue)
            _run(service, folder, listener, loopback, ready)


def _run(service: Service, folder: Path, listener: socket.socket, loopback: bool, ready: Callable[[str], None]) -> None:
    # Gradio reads these when it is imported.
    os.environ |= {"GRADIO_TEMP_DIR": str(folder / "uploads"), "GRADIO_ANALYTICS_ENABLED": "False"}
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")  # Gradio imports it, and it stores a list of fonts
    import gradio
    import uvicorn

    from fastuper.serve.page import build_page, theme

    page = build_page(service, folder / "examples").queue(max_size=None, api_open=False)
    uploads, largest = Uploads(folder / "uploads"), size_limit(service.max_pixels)
    app = build_app(service, folder, uploads)
    gradio.mount_gradio_app(
        app,
        page,
        "/",
        footer_links=[],
        show_error=True,
        max_file_size=largest,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        css="#viewer { padding: 0 }",
    )
    answer_failures(app.routes[-1].app)
    config = uvicorn.Config(
        Guard(app, uploads, loopback=loopback, largest=largest),
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    _listen(listener)
    name, port = listener.getsockname()[:2]
    ready(f"http://{f'[{name}]' if ':' in name else name}:{port}")
    try:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        service.queue.close()


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; nobody can connect to it before `_listen`.

    Raises:
        ServeError: the address is not known or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"--host {one_line(host)}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _in_use(host, port, error) from None
    return listener


def _listen(listener: socket.socket) -> None:
    """Open the port of a bound socket.

    Raises:
        ServeError: another program has opened it meanwhile.
    """
    try:
        listener.listen(128)
    except OSError as error:
        host, port = listener.getsockname()[:2]  # IPv6 has two more
        raise _in_use(host, port, error) from None


def _in_use(host: str, port: int, error: OSError) -> ServeError:
    return ServeError(f"cannot listen on {one_line(host)}, port {port}: {error.strerror}; give another --port")
