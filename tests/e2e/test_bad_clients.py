"""Every bad client is gone within its bound, and nobody else notices: the cases of docs/reliability.rst.

They are played with short settings, each on a server of its own, by a process of their own; as many at once as
the machine carries, since most of them only wait. The page's table is made with the settings' defaults, by
``python -m tests.e2e.bad_clients --write``.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.e2e.bad_clients.cases import BY_NAME
from tests.e2e.servers import ROOT, environment

# A case waits for its turn, and for its bound.
TEST_SECONDS = 280


class Run:
    """The process that plays the cases; what it has said of each."""

    def __init__(self, names: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.bad_clients", "--test", "--quiet", "1", *names],
            cwd=ROOT,
            env=environment({}),
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said: dict[str, tuple[str, list[str]]] = {}
        self._changed = threading.Condition()
        self._over = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                # Between them stand the consoles of the servers.
                with suppress(json.JSONDecodeError):
                    name, text, wrong = json.loads(line)
                    self._said[name] = text, wrong
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def result(self, name: str) -> tuple[str, list[str]]:
        """The figures of a case, and what was wrong with it."""
        deadline = time.monotonic() + TEST_SECONDS - 10
        with self._changed:
            while name not in self._said and not self._over:
                assert self._changed.wait(deadline - time.monotonic()), f"{name} has no end"
        return self._said[name]

    def close(self) -> None:
        if not self._over:
            self.process.send_signal(signal.SIGINT)
        self._reader.join()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """All cases that were selected are played, whichever is asked for first."""
    chosen = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}  # type: ignore[attr-defined]
    run = Run([name for name in BY_NAME if name in chosen])
    yield run
    run.close()


@pytest.mark.timeout(TEST_SECONDS)
@pytest.mark.parametrize("name", BY_NAME)
def test_it_is_gone_and_nobody_else_notices(name: str, run: Run) -> None:
    text, wrong = run.result(name)
    print(text)
    assert wrong == []
