"""Crash and soak: ``nox -s soak`` (ten minutes), ``nox -s soak_quick``, or ``python -m tests.soak --seconds 60``.

A server as a process, with players on both transports, publishers and commands; one fault after the other
befalls it, in an order that the seed decides. After each wave traffic pauses, and everything has to agree: all that
was answered 202 has come to all whom it was for, once and in order; every command has counted once, in the replies,
in the lines and in the data; nothing has leaked, and memory, tasks and descriptors are what they were.
Exit code 0: so it was. 1: it was not; what was wrong is printed. 2: it could not be run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import trio
from attrs import define, field, frozen
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mythos_trio.client import GOOD_SECONDS
from tests.soak.faults import GENTLE, HARD, ON_DISK, Fault, Scene, small_disk
from tests.soak.ledger import Ledger
from tests.soak.players import OtherPlayer, OwnPlayer, Player, transports_of
from tests.soak.process import Failed, Gauges, Server, wait_for
from tests.soak.traffic import Commander, Counts, Gate, Publisher

DISK_MIB: Final = 256
# Between two requests of one publisher, and between two commands of one player: a third of one core.
PUBLISH_PAUSE: Final = 0.06
COMMAND_PAUSE: Final = 0.8
QUIET_SECONDS: Final = 45.0
# What a life may use more than at its first measurement, which is made when it has served for some seconds: the
# sessions' logs fill up to their bounds, SQLite's caches (of 32 and twice 8 MiB) with what is stored, and Python
# does not give back all that it has freed. Measured: 10 MiB in the first 5,000 messages, 0.55 KiB for each of the
# next 60,000, then nothing for 50,000 more.
RSS_MIB: Final = 16.0
RSS_MIB_A_MESSAGE: Final = 1 / 1024
MOST_RSS_MIB: Final = 64.0
FILES_MORE: Final = 2
ISOLATED: Final = "MYTHOS_SOAK_ISOLATED"


class Broken(Exception):
    """A promise: the ledger knows which. There is no use in going on."""


@frozen
class Options:
    seconds: float
    seed: int
    players: int
    publishers: int
    faults: dict[str, Fault]
    keep: bool


@define
class Row:
    """A wave, as it is shown."""

    number: int
    fault: str
    life: int
    seconds: float
    published: int
    delivered: int
    commands: int
    publishing_gap: float
    silence: float
    """Of the players with a client that tries again at once."""
    own_silence: float
    """Of those with ours, which waits longer from try to try."""
    gauges: Gauges
    notes: str


@define(eq=False)
class Soak:
    """The run."""

    options: Options
    scene: Scene
    console: Console
    gate: Gate = field(factory=Gate)
    commanders: list[Commander] = field(factory=list)
    rows: list[Row] = field(factory=list)
    lives: dict[int, Gauges] = field(factory=dict)
    """What each life used at its first measurement."""
    began_with: dict[int, int] = field(factory=dict)
    """How many messages had been published by then."""
    most: float = 0.0
    wave_number: int = 0
    doing: str = "starts"

    @property
    def server(self) -> Server:
        return self.scene.server

    @property
    def ledger(self) -> Ledger:
        return self.scene.ledger

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await self.server.start()
                nursery.start_soon(self.server.watch)
                nursery.start_soon(self._show)
                await self._begin(nursery)
                with suppress(Broken):
                    await self._waves()
                await self.scene.terminate_for_good()
                nursery.cancel_scope.cancel()
        except* Failed as failed:
            for error in leaves(failed):
                self.ledger.violation(f"{self.doing}: {error}")

    async def _begin(self, nursery: trio.Nursery) -> None:
        for player in self.scene.players:
            nursery.start_soon(player.run)
        await self._wait_connected()
        for player in self.scene.players:
            self.commanders.append(Commander(player, self.ledger, self.scene.counts, self._dice()))
        await self._look()  # all have joined, and hear what is said from here on
        for commander in self.commanders:
            nursery.start_soon(commander.run, self.gate, COMMAND_PAUSE)
        ids = [player.id for player in self.scene.players]
        for index in range(self.options.publishers):
            publisher = Publisher(
                f"publisher{index}", self.server.url, ids, self.ledger, self.scene.counts, self._dice()
            )
            nursery.start_soon(publisher.run, self.gate, PUBLISH_PAUSE)

    def _dice(self) -> random.Random:
        return random.Random(self.scene.dice.random())

    async def _waves(self) -> None:
        """Rounds of all faults: one whole round, and as much of others as there is time for. In a round the process
        lives on as long as it can, since what grows is seen only in a long life."""
        until = trio.current_time() + self.options.seconds
        for round_number in itertools.count():
            for name in self._round(1 if round_number == 0 else 2):
                if round_number and trio.current_time() > until:
                    return
                await self._wave(name, self.options.faults.get(name, nothing))
            if trio.current_time() > until:
                return

    def _round(self, passes: int) -> Iterator[str]:
        """The gentle faults *passes* times, then the hard ones, each time in another order."""
        yield "nothing"
        for kind in (*(GENTLE for _ in range(passes)), HARD):
            names = [name for name in kind if name in self.options.faults]
            self.scene.dice.shuffle(names)
            yield from names

    async def _wave(self, name: str, fault: Fault) -> None:
        self.wave_number += 1
        self.doing = f"wave {self.wave_number}, {name}"
        began, counts = trio.current_time(), self._counts()
        self.scene.notes.clear()
        self.server.read_log(forget=True)
        self.ledger.begin_wave()
        self.gate.set(True)
        await trio.sleep(self.scene.dice.uniform(0.3, 0.8))
        await fault(self.scene)
        await self.server.wait_ready()
        await self._served_again()
        await self._quiet()
        gauges = await self._measure()
        self._look_at_log()
        published, delivered, commands = (now - then for now, then in zip(self._counts(), counts, strict=True))
        row = Row(
            self.wave_number,
            name,
            self.server.lives,
            trio.current_time() - began,
            published,
            delivered,
            commands,
            self.ledger.worst_publishing,
            self._silence(OtherPlayer),
            self._silence(OwnPlayer),
            gauges,
            "; ".join(self.scene.notes),
        )
        self.rows.append(row)
        self._tell(row)
        if self.ledger.violations:
            raise Broken

    def _counts(self) -> tuple[int, int, int]:
        return self.ledger.published, self.ledger.delivered, self.ledger.commands

    # After a fault.

    async def _served_again(self) -> None:
        """Until everybody has heard something after the fault, so that their silence is measured whole."""
        began = self.ledger.clock()
        accounts = self.ledger.accounts.values()

        async def heard() -> bool:
            return all(account.heard_at > began for account in accounts)

        await wait_for("everybody hears something again", QUIET_SECONDS, heard)
        # Our client takes a connection for a good one after that; else it would wait longer from wave to wave.
        await trio.sleep(GOOD_SECONDS)

    async def _quiet(self) -> None:
        """Nothing is under way; then everything has to agree."""
        self.gate.set(False)
        with trio.move_on_after(QUIET_SECONDS) as scope:
            await self.gate.wait_empty()
        if scope.cancelled_caught:
            raise Failed(f"{self.gate.under_way} requests had no answer within {QUIET_SECONDS:g} s")
        with trio.move_on_after(QUIET_SECONDS):
            while any(True for _ in self.ledger.missing()):
                await trio.sleep(0.02)
        await self._wait_connected()
        self.ledger.check()
        await self._look()

    async def _wait_connected(self) -> None:
        expected = sum(len(player.transports) for player in self.scene.players)

        async def connected() -> bool:
            here = sum(player.connected for player in self.scene.players)
            return here == expected and await self.server.total_connections() == expected

        await wait_for(f"{expected} connections", QUIET_SECONDS, connected)

    async def _look(self) -> None:
        """What is stored is what was replied and told."""
        data = {}
        for commander in self.commanders:
            player = commander.player
            data[player.id] = await commander.ask(f"look-{self.wave_number}-{player.id}", "look")
            player.account.looked(data[player.id])
        everybody = sum(entry["count"] for entry in data.values())
        if any(entry["all"] != everybody for entry in data.values()):
            self.ledger.violation(f"the counts add up to {everybody}, and the common one differs: {data}")

    async def _measure(self) -> Gauges:
        """Once it is well again, and what ended has been tidied up."""

        async def well() -> bool:
            return await self.server.trouble() is None

        await wait_for("it is healthy again", 20, well)
        first = next(iter(self.lives.values()), None)
        base = self.lives.get(self.server.lives)
        published = self.ledger.published - self.began_with.setdefault(self.server.lives, self.ledger.published)
        gauges = await self.server.gauges()
        with trio.move_on_after(20):
            while excess(gauges, first, base, published):
                await trio.sleep(0.25)
                gauges = await self.server.gauges()
        for text in excess(gauges, first, base, published):
            self.ledger.violation(f"{self.doing}: {text}")
        self.lives.setdefault(self.server.lives, gauges)
        return gauges

    def _look_at_log(self) -> None:
        for line in self.server.read_log():
            if line["level"] == "CRITICAL" and "disk" not in self.doing and "lock" not in self.doing:
                self.ledger.violation(f"in the log: {line}")
            if "exception" in line or line["event"].startswith("Unexpected error"):
                self.ledger.violation(f"in the log: {line['event']}\n{line.get('exception', line)}")

    def _silence(self, *kinds: type[Player]) -> float:
        silences = (player.account.worst_silence for player in self.scene.players if isinstance(player, kinds))
        return max(silences, default=0.0)

    # What it says.

    async def _show(self) -> None:
        """The line of progress, on a terminal."""
        if not self.console.is_terminal:
            return
        began, before = trio.current_time(), self._counts()
        with Live(console=self.console, transient=True, auto_refresh=False) as live:
            while True:
                await trio.sleep(0.5)
                now = self._counts()
                rates = [2 * (new - old) for new, old in zip(now, before, strict=True)]
                before = now
                left = max(0.0, self.options.seconds - (trio.current_time() - began))
                gap = max(self.ledger.worst_publishing, self._silence(OwnPlayer, OtherPlayer))
                text = (
                    f"{self.doing} · {rates[0]} published/s, {rates[1]} delivered/s, {rates[2]} commands/s · "
                    f"worst gap {gap:.1f} s · life {self.server.lives} · {left:.0f} s left"
                )
                live.update(Text(text), refresh=True)

    def _tell(self, row: Row) -> None:
        gauges = row.gauges
        self.console.print(
            f"wave {row.number:3} {row.fault:12} life {row.life:3}  {row.seconds:5.1f} s  {row.published:5} published "
            f"{row.delivered:6} delivered {row.commands:5} commands  nothing stored {row.publishing_gap:4.1f} s, "
            f"nothing heard {row.silence:4.1f} s, {row.own_silence:4.1f} s  {gauges.tasks} tasks {gauges.files} files "
            f"{gauges.rss_mib:.0f} MiB  {row.notes}",
            highlight=False,
            soft_wrap=True,
        )

    def summary(self) -> None:
        ledger, counts = self.ledger, self.scene.counts
        faults = Table(title="Waves by fault, and the longest time without service")
        faults.add_column("fault")
        for name in ("waves", "nothing stored", "nothing heard", "… by our client"):
            faults.add_column(name, justify="right")
        for name in dict.fromkeys(row.fault for row in self.rows):
            rows = [row for row in self.rows if row.fault == name]
            worst = [max(getattr(row, what) for row in rows) for what in ("publishing_gap", "silence", "own_silence")]
            faults.add_row(name, str(len(rows)), *(f"{seconds:.1f} s" for seconds in worst))
        self.console.print(faults)
        lives = Table(title="What each life used, at its first and last measurement")
        for name in ("life", "waves", "tasks", "files", "threads", "MiB"):
            lives.add_column(name, justify="right")
        for life in self.lives:
            rows = [row for row in self.rows if row.life == life]
            ends = [row.gauges for row in (rows[0], rows[-1])] if rows else []
            if ends:
                shown = [change(*(getattr(end, name) for end in ends)) for name in ("tasks", "files", "threads")]
                lives.add_row(str(life), str(len(rows)), *shown, change(*(round(end.rss_mib) for end in ends)))
        self.console.print(lives)
        totals = Table(title="In all", show_header=False)
        kinds = ", ".join(f"{count} × {kind}" for kind, count in self.scene.kills.items())
        for name, value in (
            ("lives of the server", f"{self.server.lives}"),
            ("exit codes", ", ".join(f"{count} × {code}" for code, count in self.server.exits.items())),
            ("faults", kinds),
            (
                "messages published",
                f"{ledger.published}, {counts.refused} requests refused, {counts.unknown} unanswered",
            ),
            ("known again", f"{counts.duplicates} were stored already; {len(ledger.given_up)} given up"),
            ("messages delivered", f"{ledger.delivered}, to {len(ledger.accounts)} players"),
            ("commands", f"{ledger.commands}; asked again {counts.asked_again} times"),
            ("connections ended", f"{sum(player.ended for player in self.scene.players)}"),
            ("broken promises", f"{len(ledger.violations)}"),
        ):
            totals.add_row(name, value)
        self.console.print(totals)


async def nothing(scene: Scene) -> None:
    """To measure by."""
    await trio.sleep(2.0)


def excess(gauges: Gauges, first: Gauges | None, base: Gauges | None, published: int) -> list[str]:
    """What is too much.

    :param first: of the first life: as many connections, so as many tasks. :param base: of this one.
    :param published: messages since *base*.
    """
    found = [f"{gauges.leaks} leaks"] if gauges.leaks else []
    if first is not None and gauges.tasks > first.tasks:
        found.append(f"{gauges.tasks} tasks, and it were {first.tasks}")
    if base is not None and gauges.files > base.files + FILES_MORE:
        found.append(f"{gauges.files} open files, and it were {base.files}")
    more = min(MOST_RSS_MIB, RSS_MIB + RSS_MIB_A_MESSAGE * published)
    if base is not None and gauges.rss_mib > base.rss_mib + more:
        found.append(f"{gauges.rss_mib:.0f} MiB, and it were {base.rss_mib:.0f}")
    return found


def change(first: int, last: int) -> str:
    return f"{first} → {last}"


def leaves(group: BaseExceptionGroup[Failed]) -> Iterator[Failed]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def players(server: Server, ledger: Ledger, count: int, dice: random.Random) -> list[Player]:
    """Every second one uses our own client."""
    found: list[Player] = []
    for index in range(count):
        kind = OwnPlayer if index // 2 % 2 else OtherPlayer
        account = ledger.account(f"player-{index}")
        found.append(kind(server.url, account, transports_of(index), random.Random(dice.random())))
    return found


@contextmanager
def directory(keep: bool) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mythos-soak-"))
    try:
        yield path
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def place_of_store(path: Path, options: Options) -> Iterator[Path]:
    """A small file system if a fault is going to fill it."""
    if ON_DISK & options.faults.keys():
        with small_disk(path, DISK_MIB) as disk:
            yield disk
    else:
        yield path


def run(options: Options, console: Console) -> int:
    dice = random.Random(options.seed)
    with directory(options.keep) as path, place_of_store(path, options) as disk:
        server = Server(path, disk / "mythos.db")
        ledger = Ledger()
        who = players(server, ledger, options.players, dice)
        soak = Soak(options, Scene(server, who, ledger, Counts(), dice, disk), console)
        try:
            trio.run(bounded, soak)
        finally:
            server.close()
        soak.summary()
        if not ledger.violations:
            console.print(f"Nothing lost, nothing twice, nothing out of order. Seed {options.seed}.")
            return 0
        console.print(f"[bold red]Broken[/], with seed {options.seed}:")
        console.print(ledger.account_of_violations(), markup=False, highlight=False)
        console.print(f"The log's end:\n{log_end(server)}", markup=False, highlight=False)
        return 1


async def bounded(soak: Soak) -> None:
    """The run has an end, whatever happens."""
    seconds = 2 * soak.options.seconds + 240
    with trio.move_on_after(seconds) as scope:
        await soak.run()
    if scope.cancelled_caught:
        soak.ledger.violation(f"{soak.doing}: the run was not through after {seconds:g} s")


def log_end(server: Server) -> str:
    path = server.directory / "logs/mythos.log"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    told = [line for line in lines if '"Message delivered"' not in line]
    return "\n".join(line[:2000] for line in told[-25:])


def isolate() -> None:
    """Run in a process and mount namespace of its own, where there are such: then nothing outlives the run, however
    it ends, and it needs no root to mount a file system."""
    if ISOLATED in os.environ or shutil.which("unshare") is None:
        return
    command = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    command += ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*command, "true"], capture_output=True, timeout=20).returncode == 0:
        os.environ[ISOLATED] = "1"
        os.execvp(command[0], [*command, sys.executable, "-m", "tests.soak", *sys.argv[1:]])


def minutes(text: str) -> float:
    return 60 * float(text)


def parse(arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long; at least one round of all faults")
    parser.add_argument("--minutes", type=minutes, dest="seconds", help="the same, in minutes")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="decides the order of the faults")
    parser.add_argument("--players", type=int, default=24)
    parser.add_argument("--publishers", type=int, default=6)
    names = [*GENTLE, *HARD]
    parser.add_argument("--without", default="", help=f"faults to leave out: {', '.join(names)}")
    parser.add_argument("--only", default="", help="faults to try, and no others")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the log")
    given = parser.parse_args(arguments)
    without, only = (set(filter(None, text.split(","))) for text in (given.without, given.only))
    if unknown := (without | only) - {*names}:
        parser.error(f"there is no fault {sorted(unknown)}")
    faults = {name: fault for name, fault in {**GENTLE, **HARD}.items() if name in (only or names)}
    return Options(
        seconds=given.seconds,
        seed=given.seed,
        players=given.players,
        publishers=given.publishers,
        faults={name: fault for name, fault in faults.items() if name not in without},
        keep=given.keep,
    )


def main() -> int:
    options = parse()
    isolate()
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    console.print(f"Seed {options.seed}. {options.players} players, {options.publishers} publishers.", highlight=False)
    try:
        return run(options, console)
    except Failed as failed:
        console.print(f"Cannot run: {failed}", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
