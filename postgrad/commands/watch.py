"""Serve the pages of runs to a browser on this machine; they reload while the runs go on.

The server listens on the loopback address only, answers only requests that name it (so that no website can read a page through
a name of its own that leads here), reads the run folders, and writes nothing.
"""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from postgrad.commands.list_runs import RunList, find_runs, list_runs
from postgrad.errors import PostgradError, ServiceError, StageError, suggest_path
from postgrad.foreign_text import mask_secrets
from postgrad.lineage.record import LOCK, RECORD
from postgrad.reports.html.document import intro_paragraph, preformatted, render_page
from postgrad.reports.pages.rewrite_report import render_report
from postgrad.storage.file_lock import is_locked

_RELOAD_SECONDS = 5
_HOSTS = ("127.0.0.1", "localhost")


class PageServer:
    """Serves one run, or every run below a folder. Use it as a context manager; it listens from its construction on."""

    def __init__(self, folder: Path | str, port: int = 0) -> None:
        """`port` 0 takes a free one. Raises `StageError` for a folder without runs, `ServiceError` for a port in use."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise StageError(f"there is no folder {folder}", where="FOLDER", hint=suggest_path(self.folder))
        if next(iter(find_runs(self.folder)), None) is None:
            raise StageError(f"there is no run in {folder}", where="FOLDER", expected="a run folder, or one with runs")
        pages = self

        class Handler(_Handler):
            server_pages = pages

        try:
            self._server = ThreadingHTTPServer((_HOSTS[0], port), Handler)
        except (OSError, OverflowError) as error:
            problem = getattr(error, "strerror", None) or str(error)
            raise ServiceError(
                f"cannot listen on port {port}: {problem}", where="--port", hint="another port, or 0 for a free one"
            ) from error

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        """The address for a browser."""
        return f"http://{_HOSTS[0]}:{self.port}/"

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def serve(self) -> None:
        """Answer requests until `close` is called, or the process is interrupted."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """End `serve`, from another thread."""
        self._server.shutdown()

    def page(self, path: str) -> tuple[str, bool] | None:
        """The page at a path of the URL, and whether it will change; None: there is none."""
        runs = {_run_path(self.folder, run): run for run in find_runs(self.folder)}
        if run := runs.get(path):
            return _run_page(run)
        return (_list_page(list_runs(self.folder)), True) if path == "/" else None


class _Handler(BaseHTTPRequestHandler):
    """Answers GET requests with pages."""

    server_pages: PageServer

    def do_GET(self) -> None:
        """Answer with the page of the path, or 304 when the browser has it."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in _HOSTS:
            self._send(HTTPStatus.FORBIDDEN, b"open this server by its own address\n", {})
            return
        try:
            found = self.server_pages.page(unquote(urlsplit(self.path).path))
        except (PostgradError, OSError) as error:  # a folder that is being removed
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, mask_secrets(f"{error}\n").encode(), {})
            return
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, b"no run is here\n", {})
            return
        page, is_changing = found
        body = page.encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if is_changing:
            headers["Refresh"] = str(_RELOAD_SECONDS)
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", headers)
        else:
            self._send(HTTPStatus.OK, body, headers | {"Content-Type": "text/html; charset=utf-8"})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))} | headers
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the browser has closed the page
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Print no request."""


def _run_path(folder: Path, run: Path) -> str:
    return "/" if run == folder else f"/{run.relative_to(folder).as_posix()}/"


def _run_page(run: Path) -> tuple[str, bool]:
    try:
        return mask_secrets(render_report(run)), is_locked(run / LOCK) or not (run / RECORD).exists()
    except PostgradError as error:
        return render_page(run.name, "run", run.name, preformatted(mask_secrets(error)), []), True


def _list_page(runs: RunList) -> str:
    about = intro_paragraph("The list and the pages of runs that go on reload by themselves.")
    return render_page(
        str(runs.folder),
        "runs",
        str(runs.folder),
        about,
        [("runs", "Runs", "Runs", runs.table(with_links=True).html())],
    )
