"""The composition root: what exists, who runs it, and how it stops.

Read top to bottom it is the list of the server's parts and the tree of its tasks. A crash in any of them
ends the process, loudly, with what is stored intact; a crash in a player's session does not get here.

Stopping (contract, section 5): not ready, and nothing new is taken; running handlers have half of
DRAIN_TIMEOUT; what is queued is committed, delivered and replied to; connections are told when to come
back; marks are stored and the store is closed in order.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import trio
from attrs import frozen

from mythos_trio import __version__, logs
from mythos_trio.access import Access
from mythos_trio.api import create_app
from mythos_trio.bridge import Bridge
from mythos_trio.checker import Checker
from mythos_trio.config import Settings, sqlite_path
from mythos_trio.core.errors import DRAIN, ErrorType
from mythos_trio.core.rates import return_ms
from mythos_trio.dispatcher import Dispatcher, Failure
from mythos_trio.front import HEAD_SECONDS, Door, Front, Kind, Route
from mythos_trio.game import Game, load_game
from mythos_trio.garbage import Garbage
from mythos_trio.handlers import Background, Context, GameRunner, WorldTimers
from mythos_trio.handover import Notifier
from mythos_trio.hub import Hub
from mythos_trio.kept import IDLE_SECONDS
from mythos_trio.ledger import Bounds, Ledger
from mythos_trio.monitor import Monitor, Stage
from mythos_trio.net import Listener, open_listeners
from mythos_trio.poller import Poller
from mythos_trio.posts import Posts, longest_request
from mythos_trio.registrar import Registrar
from mythos_trio.seams import Clock, Randomness, SystemClock, SystemRandomness
from mythos_trio.sqlite import SqliteDatabase
from mythos_trio.sse import SSETransport
from mythos_trio.statistics import Statistics
from mythos_trio.storage import Database, Recovered, Runner, Storage, StoreError, ThreadRunner
from mythos_trio.streams import Streams
from mythos_trio.turns import Turns
from mythos_trio.websocket import WebSocketTransport

if TYPE_CHECKING:
    from mythos_trio.access import Visitor
    from mythos_trio.http1 import Head
    from mythos_trio.link import Link

log = logs.get("server")
database_log = logs.get("database")

DEFAULT_GAME: Final = "mythos_trio.world:DefaultGame"
MAX_FAILURES: Final = 1024
# What is left of DRAIN_TIMEOUT for the last words, the marks and the store.
LAST_SECONDS: Final = 2.0
# After the commit an answer takes no time, but a request whose body never comes would hold up the drain.
ANSWER_SECONDS: Final = 1.0
# What a task of the game's that cannot be cancelled has left after the drain, before the process ends without it.
LINGER_SECONDS: Final = 2.0
# How long a predecessor that drains is waited for, on top of DRAIN_TIMEOUT.
TAKE_OVER_SECONDS: Final = 10.0

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1


class Handlers:
    """What the front door hands its requests to."""

    def __init__(
        self, streams: Streams, registrar: Registrar, posts: Posts, websocket: WebSocketTransport, sse: SSETransport
    ) -> None:
        self._streams = streams
        self._registrar = registrar
        self._posts = posts
        self.take_post = posts.take
        self.too_late = posts.too_late
        self._websocket = websocket
        self._sse = sse

    async def websocket(self, link: Link, head: Head, visitor: Visitor, player: str) -> None:
        await self._streams.serve(link, head, visitor, player, self._websocket)

    async def sse(self, link: Link, head: Head, visitor: Visitor, player: str) -> None:
        if self._was_removed(head, player):
            await self._sse.gone(link, head)
        else:
            await self._streams.serve(link, head, visitor, player, self._sse)

    def _was_removed(self, head: Head, player: str) -> bool:
        """Whether this is the browser's own reconnect of a player whom the operator has just removed."""
        if not head.header("last-event-id") or head.query.get("session_id"):
            return False
        return self._registrar.was_removed(player)

    def arrive(self, to: Route, link: Link, head: Head, visitor: Visitor, door: Door) -> None:
        player = to.player
        assert player is not None  # for the type checker: it is a stream's route
        if to.kind is Kind.WEBSOCKET:
            self._streams.arrive(link, head, visitor, player, self._websocket, door)
        elif self._was_removed(head, player):
            door.start(partial(self._sse.gone, link, head))
        else:
            self._streams.arrive(link, head, visitor, player, self._sse, door)

    async def post(self, link: Link, head: Head, visitor: Visitor) -> bool:
        return await self._posts.serve(link, head, visitor)


class Server:
    """One server process. The seams come in here, so that tests can run it whole in virtual time."""

    def __init__(
        self,
        settings: Settings,
        *,
        game: Game,
        database: Database,
        runner: Runner,
        clock: Clock,
        randomness: Randomness,
        statistics: Statistics | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.storage = Storage(database, runner, clock)
        self.statistics = statistics or Statistics()
        self.hub = Hub(self.storage, settings.server_id)
        failures, self._failures = trio.open_memory_channel[Failure](MAX_FAILURES)
        self.dispatcher = Dispatcher(
            self.hub,
            self.storage,
            self.statistics,
            clock,
            batch_size=settings.message_batch_size,
            failures=failures,
        )
        self.context = Context(
            hub=self.hub,
            dispatcher=self.dispatcher,
            game=game,
            settings=settings,
            statistics=self.statistics,
            clock=clock,
            randomness=randomness,
        )
        self._randomness = randomness
        self.access = Access(settings, clock)
        turns = Turns()
        self.registrar = Registrar(self.context, turns)
        self.streams = Streams(self.context, self.registrar, self.access, turns)
        self.ledger = Ledger(self.hub)
        self.poller = Poller(self.context.stage)
        self.checker = Checker(self.context, self.registrar, self._failures, self.ledger.look)
        self.monitor: Monitor | None = None
        self.front: Front | None = None
        self._background = Background(self.context)
        self._recovered: Recovered | None = None
        self._stop = trio.Event()
        self._hurry = trio.CancelScope()
        self.on_drained: Callable[[], None] = lambda: None
        """Called when the drain is over; then all tasks are cancelled."""
        self.exit_code = EXIT_FAILED

    def stop(self) -> None:
        """Drain; a second call hurries."""
        if self._stop.is_set():
            self._hurry.cancel()
        self._stop.set()

    async def open(self) -> Recovered:
        """Open the store and take over what it holds. Raises `StoreUnusable`."""
        self._recovered = recovered = await self.storage.open()
        database_log.info("Database connection successful", driver="sqlite3", recovered=len(recovered.sessions))
        self.hub.start(recovered)
        return recovered

    async def serve(
        self,
        listeners: Sequence[Listener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> int:
        """Run until stopped; the exit code. Opens the store first if that has not been done."""
        recovered = self._recovered or await self.open()
        self.monitor = monitor = Monitor(
            self.hub,
            self.dispatcher,
            self.checker,
            self.storage,
            self.statistics,
            self.settings,
            self.clock,
            self.ledger,
        )
        app = create_app(
            monitor, self.registrar, self.dispatcher, self.access, self.settings, self.settings.server_id, self.clock
        )
        bridge = Bridge(app, self.settings)
        self.front = self._front(bridge)
        self.context.game.bind(GameRunner(self.context))
        self._open_ledger(listeners)
        async with trio.open_nursery() as nursery:
            self.ledger.nursery = nursery
            nursery.start_soon(self.dispatcher.write_forever, name="writer")
            nursery.start_soon(self.dispatcher.dispatch_forever, name="dispatcher")
            await nursery.start(self.poller.run, name="poller")
            await nursery.start(self.registrar.run, name="registrar")
            await nursery.start(self.streams.run, name="streams")
            nursery.start_soon(monitor.watch, name="monitor")
            nursery.start_soon(self.context.graces.run, name="grace times")
            nursery.start_soon(WorldTimers(self.context).run, name="the world's timers")
            nursery.start_soon(self.context.keep_deadlines, name="deadlines of handlers")
            for loop in self.checker.loops():
                nursery.start_soon(loop, name=f"health checker: {loop.__name__}")
            await nursery.start(bridge.run, name="bridge")
            self.registrar.recover(recovered.sessions)
            nursery.start_soon(self.front.keep_times, name="newcomers")
            for listener in listeners:
                nursery.start_soon(self.front.serve, listener, name="front door")
            nursery.start_soon(self._background.run, name="background of the game")
            monitor.stage = Stage.READY
            log.info("Server ready", pid=os.getpid(), version=__version__, epoch=self.hub.epoch)
            task_status.started()
            await self._stop.wait()
            await self._drain(monitor)
            self.on_drained()
            nursery.cancel_scope.cancel()
        return self.exit_code

    def _open_ledger(self, listeners: Sequence[Listener]) -> None:
        self.ledger.registrar = self.registrar
        self.ledger.ports = frozenset(listener.address[1] for listener in listeners)
        self.ledger.bounds = Bounds(
            handshake=HEAD_SECONDS, request=longest_request(self.settings), idle=IDLE_SECONDS + HEAD_SECONDS
        )

    def _front(self, bridge: Bridge) -> Front:
        settings = self.settings
        websocket = WebSocketTransport(
            self.streams,
            self.poller,
            self.access,
            self.clock,
            max_message_size=settings.max_message_size,
            server_id=settings.server_id,
        )
        sse = SSETransport(self.poller, self.access, self.clock, server_id=settings.server_id)
        posts = Posts(self.context, self.registrar, self.streams, self.access)
        handlers = Handlers(self.streams, self.registrar, posts, websocket, sse)
        return Front(
            settings,
            access=self.access,
            handlers=handlers,
            bridge=bridge,
            clock=self.clock,
            statistics=self.statistics,
            ledger=self.ledger,
            poller=self.poller,
        )

    # Stopping.

    async def _drain(self, monitor: Monitor) -> None:
        """The five steps. A commit that hangs is abandoned; then the exit code says so."""
        began = trio.current_time()
        total = self.settings.drain_timeout
        monitor.stage = Stage.DRAINING
        self.context.draining = True
        if self.front is not None:
            self.front.draining = True
        log.info("Draining", connections=len(self.hub.connections), sessions=len(self.hub.sessions))
        self._background.stop()
        for session in list(self.hub.sessions.values()):
            session.drain()
        with self._hurry:
            with trio.move_on_at(began + max(total - LAST_SECONDS, total / 2)):
                await self._finish_handlers(began + total / 2)
                self._background.cancel()
                await self._finish_requests()
        self._say_goodbye()
        with trio.move_on_at(began + total) as deadline:
            await self.streams.wait_quiet()
            if self.front is not None:
                self.front.stop_accepting()
                await self.front.wait_answered(ANSWER_SECONDS)
            self.exit_code = await self._close_store()
        if deadline.cancelled_caught:
            self.exit_code = EXIT_FAILED
            log.error(
                "Unexpected error in drain: the store was not closed in order within DRAIN_TIMEOUT",
                error_type=ErrorType.PERSISTENCE.value,
            )
        log.info("Server stopped", exit_code=self.exit_code, seconds=round(trio.current_time() - began, 3))

    async def _finish_handlers(self, until: float) -> None:
        """Running handlers may end by themselves until then; after that they are cut off."""
        with trio.move_on_at(until):
            await self.context.wait_handlers()
        for deadline in self.context.handlers:
            deadline.cut_off()
        await self.context.wait_handlers()

    async def _finish_requests(self) -> None:
        """What is queued is committed, and who waits for it, or came too late, has the answer. What asked
        before the drain may have queued one more change in the meantime."""
        await self.dispatcher.wait_idle()
        if self.front is not None:
            await self.front.wait_answered(ANSWER_SECONDS)
        await self.dispatcher.wait_idle()

    def _say_goodbye(self) -> None:
        """Tell every client when to come back, spread out."""
        for place, connection in enumerate(list(self.hub.connections.values())):
            connection.end(DRAIN, retry_ms=return_ms(place + self._randomness.uniform(0, 1)))

    async def _close_store(self) -> int:
        noted = await self.checker.note()
        try:
            await self.storage.close()
        except StoreError as error:
            database_log.error(
                "Unexpected error in closing the store",
                error_type=ErrorType.PERSISTENCE.value,
                reason=str(error),
            )
            return EXIT_FAILED
        return EXIT_OK if noted else EXIT_FAILED


# The process.


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one; how many there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def run(
    settings: Settings,
    game_spec: str = DEFAULT_GAME,
    *,
    announce: Callable[[list[tuple[str, int]]], None] = lambda _: None,
    hang_up: Callable[[], None] = lambda: None,
    inherited: Sequence[Listener] = (),
    notifier: Notifier | None = None,
    stands_by: Callable[[], None] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Logging has been set up by the caller.

    :param announce: is told the addresses when the server is ready.
    :param hang_up: what SIGHUP does: the log is opened again.
    :param inherited: what to listen on; HOST and PORT then are not.
    :param notifier: is told when the server is ready, and when it stops.
    :param stands_by: is called when all but the store is there; whoever has that is then waited for.
    :raises PortTaken: :raises StoreUnusable: :raises GameSpecError:
    """
    game = load_game(game_spec)
    files = raise_file_limit()
    if files < settings.max_total_connections + 100:
        log.warning(
            "The limit of open files is lower than MAX_TOTAL_CONNECTIONS",
            files=files,
            setting="MAX_TOTAL_CONNECTIONS, or LimitNOFILE of the service",
        )
    database = SqliteDatabase(
        sqlite_path(settings.database_url),
        durability="power" if settings.durability == "power" else "process",
        max_store_bytes=settings.max_store_bytes,
        lock_seconds=0.0 if stands_by is None else settings.drain_timeout + TAKE_OVER_SECONDS,
    )
    listeners = inherited or open_listeners(settings.host, settings.port)
    if inherited:
        log.info(
            "Listening on inherited sockets: HOST and PORT are not looked at",
            addresses=[_address_text(listener) for listener in inherited],
        )
    if stands_by is not None:
        stands_by()
    outside = _Outside(announce, hang_up, notifier or Notifier())
    runner = ThreadRunner()
    try:
        return trio.run(_main, settings, game, database, runner, listeners, outside)
    finally:
        runner.close()
        for listener in listeners:
            listener.close()


def _address_text(listener: Listener) -> str:
    host, port = listener.address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@frozen
class _Outside:
    """Whom the process tells what, and what it does when it is told to hang up."""

    announce: Callable[[list[tuple[str, int]]], None]
    hang_up: Callable[[], None]
    notifier: Notifier


async def _main(
    settings: Settings,
    game: Game,
    database: Database,
    runner: Runner,
    listeners: Sequence[Listener],
    outside: _Outside,
) -> int:
    statistics = Statistics()
    logs.on_error(statistics.logged)
    server = Server(
        settings,
        game=game,
        database=database,
        runner=runner,
        clock=SystemClock(),
        randomness=SystemRandomness(),
        statistics=statistics,
    )
    garbage = Garbage(
        lambda: len(server.hub.connections) + len(server.hub.sessions),
        lambda: sum(session.remembered_answers for session in server.hub.sessions.values()),
    )
    lingering = threading.Timer(LINGER_SECONDS, lambda: _end_without_the_game(server.exit_code))
    lingering.daemon = True
    server.on_drained = lingering.start
    # Outside of a nursery: a failed start is one error, not a group.
    await server.open()
    garbage.start()
    async with trio.open_nursery() as nursery:
        await nursery.start(_hear_signals, server, outside)
        nursery.start_soon(_announce_when_ready, server, listeners, outside)
        code = await server.serve(listeners)
        lingering.cancel()
        nursery.cancel_scope.cancel()
    garbage.stop()
    return code


def _end_without_the_game(code: int) -> None:
    """In a thread. The store is closed; only a task of the game's keeps the process, and a thread cannot end that."""
    log.critical(
        "The game does not let the server end: one of its tasks cannot be cancelled. The process ends without it",
        error_type=ErrorType.SYSTEM.value,
        fix="no `except` around a wait that takes trio.Cancelled and goes on; no shielded scope without a deadline",
        exit_code=code,
    )
    time.sleep(0.3)  # the log's own thread writes it
    os._exit(code)


async def _announce_when_ready(server: Server, listeners: Sequence[Listener], outside: _Outside) -> None:
    while server.monitor is None or server.monitor.stage is not Stage.READY:
        await trio.sleep(0.01)
    outside.notifier.tell("READY=1")
    outside.announce([listener.address for listener in listeners])


async def _hear_signals(
    server: Server, outside: _Outside, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                outside.hang_up()
            else:
                outside.notifier.tell("STOPPING=1")
                server.stop()
