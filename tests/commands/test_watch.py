"""The pages of runs are served to this machine's browser only, as the runs are now."""

from __future__ import annotations

import http.client
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from postgrad.commands import watch
from postgrad.commands.watch import PageServer
from postgrad.errors import ServiceError, StageError
from postgrad.lineage.metrics import METRICS
from postgrad.lineage.record import LOCK, RECORD
from postgrad.storage.file_lock import file_lock
from tests.tiny_lineage import LineageRuns


@pytest.fixture
def home(runs: LineageRuns, tmp_path: Path) -> Path:
    """A finished run, one that was killed, and a damaged one."""
    for name in ("one", "study/killed run", "broken"):
        shutil.copytree(runs.naive, tmp_path / name, ignore=shutil.ignore_patterns("model", "checkpoints"))
    (tmp_path / "study/killed run" / RECORD).unlink()
    (tmp_path / "broken" / RECORD).write_text("{")
    return tmp_path


@pytest.fixture
def server(home: Path) -> Iterator[PageServer]:
    with PageServer(home) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield server
        server.close()
        thread.join()


def get(server: PageServer, path: str, **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers
    finally:
        connection.close()


def test_each_run_has_a_page_that_reloads_while_the_run_may_change(server: PageServer, home: Path) -> None:
    status, listed, headers = get(server, "/")
    assert status == 200 and headers["Refresh"] and '<a href="/study/killed%20run/">' in listed
    finished = get(server, "/one/")
    assert finished[0] == 200 and "Learned and kept" in finished[1] and "Refresh" not in finished[2]
    assert get(server, "/one/", If_None_Match=finished[2]["ETag"])[:2] == (304, "")
    before = get(server, "/study/killed%20run/")
    assert before[2]["Refresh"] and "Learned and kept" not in before[1]
    rows = (home / "study/killed run" / METRICS).read_text().splitlines(keepends=True)
    (home / "study/killed run" / METRICS).write_text("".join(rows[: len(rows) // 2]))
    after = get(server, "/study/killed%20run/", If_None_Match=before[2]["ETag"])
    assert after[0] == 200 and after[1] != before[1]
    with file_lock(home / "one" / LOCK):
        assert get(server, "/one/")[2]["Refresh"]
    broken = get(server, "/broken/")
    assert broken[0] == 200 and "record.json" in broken[1]


def test_nothing_but_pages_of_runs_is_served(server: PageServer, home: Path) -> None:
    (home / "secret.txt").write_text("secret")
    for path in ("/secret.txt", "/one/record.json", "/../secret.txt", "/one/../secret.txt", "/%2e%2e/", "/one"):
        status, body, _ = get(server, path)
        assert status == 404 and "secret" not in body, path


@pytest.mark.parametrize("guarded", [True, False])
def test_a_page_is_only_for_who_names_this_machine(
    server: PageServer, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """A website whose name resolves to the loopback address gets nothing: not so the mutant."""
    if not guarded:
        monkeypatch.setattr(watch, "_HOSTS", ("127.0.0.1", "localhost", "example.org"))
    assert get(server, "/", Host=f"localhost:{server.port}")[0] == 200
    assert get(server, "/", Host="example.org")[0] == (403 if guarded else 200)


def test_a_server_without_runs_or_port_is_an_error(home: Path, server: PageServer) -> None:
    with pytest.raises(StageError, match="there is no run in"):
        PageServer(home / "one" / "scores")
    with pytest.raises(StageError, match="there is no folder"):
        PageServer(home / "nowhere")
    with pytest.raises(ServiceError, match="cannot listen on port"):
        PageServer(home, server.port)


def test_a_single_run_is_the_root(home: Path) -> None:
    with PageServer(home / "one") as server:
        found = server.page("/")
        assert found is not None and "Learned and kept" in found[0] and not found[1]
        assert server.page("/one/") is None
