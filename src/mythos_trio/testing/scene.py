"""A scene: a server, its players, and what befalls them.

A player (`Client`) is the client that people use, on both transports, so it comes back by itself and hands on
every message once. Time is Trio's: on a mock clock (`run`, or pytest-trio's ``autojump_clock``) a scene of
an hour takes no time, and nothing in it depends on how fast the machine is.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, ParamSpec, TypeVar

import trio
from attrs import field, frozen
from trio.testing import MockClock, wait_all_tasks_blocked

from mythos_trio import logs
from mythos_trio.carriers import Base
from mythos_trio.client import ClientEnded, DualClient
from mythos_trio.core.data import player_key
from mythos_trio.core.messages import decode_json
from mythos_trio.game import Game, Presence, make_game
from mythos_trio.game import World as GameWorld
from mythos_trio.seams import SeededRandomness
from mythos_trio.testing.network import MemoryStream, MemoryWire
from mythos_trio.testing.process import Process

P = ParamSpec("P")
T = TypeVar("T")

Transport = Literal["websocket", "sse"]

URL: Final = "http://localhost:8000"
# Longer than all that has a deadline of its own: a handler, a commit, a drain.
SETTLE_SECONDS: Final = 300.0
# The first word of the path that a connection asks for.
_KINDS: Final[Mapping[str, str]] = {"websocket": "ws", "sse": "sse"}
_EVERYTHING: Final = frozenset({"ws", "sse", "api"})


class GameFailed(AssertionError):
    """The game made mistakes in the scene that no player was told the whole of: see `World.errors`."""


@frozen
class Message:
    """A message as a player's client got it. *fields*: what stood beside type and content."""

    type: str
    content: Any
    seq: int
    fields: dict[str, Any] = field(factory=dict)


@frozen
class Reply:
    """A command's answer: *content* if it is *ok*, else *error* (its text), *error_type* and *details*."""

    ok: bool
    content: Any = None
    error: str | None = None
    error_type: str | None = None
    details: dict[str, Any] = field(factory=dict)


def run(scene: Callable[[], Awaitable[T]]) -> T:
    """Run *scene*, an async function, in virtual time: whenever all wait, the clock jumps."""
    return trio.run(scene, clock=MockClock(autojump_threshold=0))


def in_virtual_time(scene: Callable[P, Awaitable[T]]) -> Callable[P, T]:
    """A decorator: *scene* as a plain function, such as pytest calls."""

    @wraps(scene)
    def test(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(partial(scene, *args, **kwargs))

    return test


@asynccontextmanager
async def play(
    game: object, *, store: Path | None = None, seed: int = 0, allow_errors: bool = False, **settings: Any
) -> AsyncIterator[World]:
    """A world that runs *game*, until the block ends.

    :param game: a `mythos_trio.game.Game`, or a class or function that makes one. From the latter each start
        of the server gets a game of its own, as each start of a process would.
    :param store: where the store is, or will be; without one it is a new one, and is removed at the end.
    :param seed: of all that is random, except in the game.
    :param allow_errors: the game may make mistakes (`World.errors`).
    :param settings: of the server, by their names: ``linkdead_grace=5``.
    :raises GameFailed: at the end, if a handler raised something other than a
        `mythos_trio.game.CommandError`, or took too long.
    """
    with TemporaryDirectory(prefix="mythos-trio-") as directory:
        world = World(game, store or Path(directory, "store.db"), seed=seed, **settings)
        forget = logs.on_error(world._hear_error)
        try:
            async with _one_error(), trio.open_nursery() as nursery:
                world._nursery = nursery
                await world._start()
                yield world
                await world._process.stop()
                nursery.cancel_scope.cancel()
        finally:
            forget()
    if world.errors and not allow_errors:
        raise GameFailed("\n".join(world.errors))


@asynccontextmanager
async def _one_error() -> AsyncIterator[None]:
    """An error of the scene, or of the server, as it is: not in the groups that nurseries put around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, BaseExceptionGroup):
            raise
        # Where it was raised is in its own traceback; that it was in a group says nothing.
        raise error from error.__cause__  # noqa: ASYNC123 - it is the scene's own


class World:
    """A running server with its players: made by `play`."""

    def __init__(self, game: object, store: Path, *, seed: int, **settings: Any) -> None:
        self.clients: dict[str, Client] = {}
        self.errors: list[str] = []
        """What the server logged as errors, with tracebacks."""
        self._game = game
        self._store = store
        self._seed = seed
        self._settings = settings
        self._nursery: trio.Nursery
        self._process: Process

    def _hear_error(self, event: dict[str, Any]) -> None:
        if event["level"] in ("ERROR", "CRITICAL"):
            fields = {name: event.get(name) for name in ("handler", "player_id", "timer", "reason") if name in event}
            rest = "".join(f" {name}={value}" for name, value in fields.items())
            self.errors.append(f"{event['event']}{rest}\n{event.get('exception', '')}".rstrip())

    @property
    def game(self) -> Game:
        """The game that runs now."""
        return self._process.server.context.game

    # Players.

    async def connect(
        self, player: str, *, session_id: str | None = None, transports: tuple[Transport, ...] = ("websocket", "sse")
    ) -> Client:
        """*player* sits down, and is told all that the game has to say to that.

        :param session_id: an id that there never was begins a new session.
        """
        if player in self.clients:
            raise AssertionError(f"{player} is there already: use what connect() returned, or reconnect() it")
        client = self.clients[player] = Client(self, player, session_id, transports)
        await client._open()
        await wait_all_tasks_blocked()
        return client

    def present(self) -> list[str]:
        """The ids of all players who are online or link-dead."""
        return self._process.server.hub.present()

    def presence(self, player: str) -> Presence:
        """``"online"``, ``"linkdead"`` or ``"offline"``."""
        session = self._process.server.hub.sessions.get(player)
        if session is None:
            return "offline"
        return "online" if session.online else "linkdead"

    # What is stored.

    @property
    def data(self) -> Stored:
        """`mythos_trio.game.World.data` as it is stored."""
        return Stored(self._process)

    def data_of(self, player: str) -> dict[str, Any]:
        """`mythos_trio.game.Player.data` as it is stored."""
        found = self.data.get(player_key(player))
        return found if isinstance(found, dict) else {}

    # Time.

    async def sleep(self, seconds: float) -> None:
        """Let time pass, and all that it brings happen. A handler that takes longer goes on."""
        await trio.sleep(seconds)
        await wait_all_tasks_blocked()

    async def settle(self) -> None:
        """Until all that has been asked for is done and told: commands, handlers, commits, deliveries.

        Timers, and what waits for time to pass, are not waited for.
        """
        with trio.fail_after(SETTLE_SECONDS):
            await wait_all_tasks_blocked()
            while self._busy:
                await trio.sleep(0.001)
                await wait_all_tasks_blocked()

    @property
    def _busy(self) -> bool:
        server = self._process.server
        sessions = server.hub.sessions.values()
        return bool(server.dispatcher.queued or server.context.handlers or any(s.running_handler for s in sessions))

    async def run(self, function: Callable[[GameWorld], Awaitable[T]]) -> T:
        """What `mythos_trio.game.Game.run` does for a task of the game's own."""
        result = await self.game.run(function)
        await wait_all_tasks_blocked()
        return result

    # Starts and ends.

    async def crash(self) -> None:
        """``kill -9`` in the middle of whatever goes on, and a new start on the same store.

        Who was connected is so again, and goes on where they were; a command that had no answer is asked again.
        """
        await self._process.kill()
        connected = [client for client in self.clients.values() if client.connected]
        for client in connected:
            await client._close()
        await self._start()
        for client in connected:
            await client._open()
        await wait_all_tasks_blocked()

    async def restart(self, game: object | None = None) -> None:
        """Stop in order, as SIGTERM and ``--reload`` do, and start again on the same store.

        :param game: what is run from then on, as for `play`.
        """
        connected = [client for client in self.clients.values() if client.connected]
        await self._process.stop()
        self._game = self._game if game is None else game
        await self._start()
        for client in connected:
            await client._wait_connected()
        await wait_all_tasks_blocked()

    async def _start(self) -> None:
        game = make_game("play()", self._game)
        self._process = Process(self._store, game, seed=self._seed, **self._settings)
        await self._nursery.start(self._process.run)


class Stored(Mapping[str, Any]):
    """The game's data, as stored: what would be there after a crash."""

    def __init__(self, process: Process) -> None:
        self._data = process.server.hub.data

    def __getitem__(self, key: str) -> Any:
        body = self._data.committed(key).body
        if body is None:
            raise KeyError(key)
        return decode_json(body)

    def __iter__(self) -> Iterator[str]:
        return iter(self._data.committed_keys())

    def __len__(self) -> int:
        return len(self._data.committed_keys())

    def __repr__(self) -> str:
        return repr(dict(self))


class Client:
    """A player at their client: made by `World.connect`."""

    def __init__(self, world: World, player: str, session_id: str | None, transports: tuple[Transport, ...]) -> None:
        self.name: Final = player
        self.scroll: list[Message] = []
        """Every message that has come, in order, each once, over all connections."""
        self.gaps: list[dict[str, Any]] = []
        """Where messages were lost, for the server had removed them."""
        self._world = world
        self._transports = transports
        self._first_session = session_id
        self._cable = _Cable(world)
        self._randomness = SeededRandomness(1000 * int.from_bytes(player.encode()) + world._process.life)
        self._dual: DualClient | None = None
        self._position: str | None = None
        self._listening = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._changed = trio.Event()
        self._looked_at = 0
        self._newest = 0

    def __repr__(self) -> str:
        return f"<Client {self.name}>"

    @property
    def session_id(self) -> str | None:
        return None if self._dual is None else self._dual.session_id

    @property
    def connected(self) -> bool:
        """Whether the player's client runs: also while a cable is cut and it does not know yet."""
        return self._dual is not None and self._dual.ended is None

    @property
    def ended(self) -> str | None:
        """Why the client does not come back by itself, if so: the reason of ``player.disconnect``, for one."""
        return None if self._dual is None or self._dual.ended is None else self._dual.ended.reason

    # What has come.

    @property
    def lines(self) -> list[Any]:
        """The contents of the scroll."""
        return [message.content for message in self.scroll]

    def heard(self, type_: str) -> list[Any]:
        """The contents of all messages of that type."""
        return [message.content for message in self.scroll if message.type == type_]

    async def until(self, wanted: str | Callable[[Message], bool], *, seconds: float = 600.0) -> Message:
        """The next message of that type, or that passes that test; it may have come already.

        Each call goes on behind the message that the last one returned. AssertionError after *seconds*.
        """
        test: Callable[[Message], bool] = (lambda m: m.type == wanted) if isinstance(wanted, str) else wanted
        began = self._looked_at
        with trio.move_on_after(seconds):
            while True:
                while self._looked_at < len(self.scroll):
                    message = self.scroll[self._looked_at]
                    self._looked_at += 1
                    if test(message):
                        return message
                await self._changed.wait()
        came = [(message.type, message.content) for message in self.scroll[began:]]
        raise AssertionError(f"{self.name} did not get {wanted!r} within {seconds:g} seconds; what came: {came}")

    # What the player does.

    async def say(self, content: object, *, id: str | None = None) -> Saying:
        """Send a command, and do not wait for the reply. It has reached the game, and is in its midst if it waits."""
        saying = Saying(self, content, id or self._randomness.token())
        self._world._nursery.start_soon(saying._run)
        await wait_all_tasks_blocked()
        return saying

    async def command(self, content: object, *, id: str | None = None, seconds: float = 60.0) -> Reply:
        """Send a command; its reply, after all that the command has said to anybody has come."""
        saying = await self.say(content, id=id)
        return await saying.reply(seconds)

    def cut(self, transport: Transport | None = None) -> None:
        """Pull the cable: nothing passes, and nobody is told. Without a *transport*: of all connections."""
        self._cable.cut_off(_EVERYTHING if transport is None else {_KINDS[transport]})

    async def leave(self) -> None:
        """Close the client: the server knows at once that its connections are gone."""
        if self._dual is not None:
            self._listening.cancel()
            await self._ended.wait()
            self._dual = None
        await wait_all_tasks_blocked()

    async def reconnect(self) -> None:
        """The cable is put back, the client is opened again: it goes on where it was."""
        everything = self._cable.gone == _EVERYTHING
        self._cable.mend()
        if everything or not self.connected:
            await self._close()
            await self._open()
        else:
            await self._wait_connected()
        await wait_all_tasks_blocked()

    # The client program.

    async def _open(self) -> None:
        self._scope, self._listening = trio.CancelScope(), trio.CancelScope()
        self._ended = trio.Event()
        await self._world._nursery.start(self._live)
        await self._wait_connected()

    async def _close(self) -> None:
        """As if the program were killed."""
        if self._dual is not None:
            self._scope.cancel()
            await self._ended.wait()

    async def _live(self, task_status: trio.TaskStatus[None]) -> None:
        known = {} if self._dual is None else {n: s.connection_id for n, s in self._dual.transports.items()}
        dual = DualClient(
            URL,
            self.name,
            session_id=self._first_session,
            position=self._position,
            transports=self._transports,
            randomness=self._randomness,
            dial=self._cable.dial,
        )
        self._first_session = None
        for name, connection_id in known.items():
            # So that the server ends them, instead of waiting for signs of life.
            dual.transports[name].connection_id = connection_id
        try:
            with self._scope:
                async with dual:
                    self._dual = dual
                    self._notify()
                    task_status.started()
                    with self._listening:
                        async for event in dual.events():
                            self._take(event)
        finally:
            self._position = dual.consumed or self._position
            self._notify()
            self._ended.set()

    async def _wait_connected(self) -> None:
        with trio.fail_after(SETTLE_SECONDS):
            while self._dual is not None and self._dual.ended is None and self._dual.health != "healthy":
                await trio.sleep(0.01)
        if self.ended is not None:
            raise AssertionError(f"{self.name} cannot connect: {self.ended}")

    def _take(self, event: dict[str, Any]) -> None:
        if event["type"] == "gap":
            self.gaps.append(event)
        elif "seq" in event and event["seq"] > self._newest:
            # The event that was being handed over when a client ended comes again to the next.
            self._newest = event["seq"]
            rest = {name: value for name, value in event.items() if name not in ("type", "content", "seq")}
            self.scroll.append(Message(event["type"], event.get("content"), event["seq"], rest))
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Saying:
    """A command that is under way: made by `Client.say`."""

    def __init__(self, client: Client, content: object, id: str) -> None:
        self.id: Final = id
        self._client = client
        self._content = content
        self._reply: Reply | None = None
        self._done = trio.Event()

    @property
    def answered(self) -> bool:
        return self._reply is not None

    async def reply(self, seconds: float = 60.0) -> Reply:
        """The reply, after all that the command has said has come. AssertionError after *seconds*."""
        with trio.move_on_after(seconds):
            await self._done.wait()
        if self._reply is None:
            why = self._client.ended or f"nothing within {seconds:g} seconds"
            raise AssertionError(f"{self._client.name} got no reply to {self._content!r}: {why}")
        await wait_all_tasks_blocked()
        return self._reply

    async def _run(self) -> None:
        """Ask until there is an answer, with the same id, across all that befalls the client."""
        client = self._client
        while self._reply is None:
            dual = client._dual
            if dual is not None and dual.ended is None:
                try:
                    answer = await dual.send_command(self._content, command_id=self.id)
                except ClientEnded:
                    continue
                self._reply = _reply(answer)
                self._done.set()
            else:
                await client._changed.wait()


def _reply(answer: dict[str, Any]) -> Reply:
    error = answer.get("error") or {}
    return Reply(
        bool(answer.get("ok")),
        answer.get("content"),
        error.get("message"),
        error.get("error_type"),
        error.get("details") or {},
    )


class _Cable:
    """The way from a player to the server, which can be cut."""

    def __init__(self, world: World) -> None:
        self.gone: frozenset[str] = frozenset()
        """Which kinds of connections do not get through: the first words of their paths."""
        self._world = world
        self._wires: list[tuple[str, MemoryWire]] = []

    async def dial(self, _base: Base) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if self.gone == _EVERYTHING:
            raise OSError(errno.ENETUNREACH, "the cable is cut")
        return _Noting(self, self._world._process.listener.connect())

    def begin(self, kind: str, wire: MemoryWire) -> None:
        """A connection of that kind begins."""
        if kind in self.gone:
            raise trio.BrokenResourceError("the cable is cut")
        self._wires = [(k, w) for k, w in self._wires if not w.closed]
        self._wires.append((kind, wire))

    def cut_off(self, kinds: frozenset[str] | set[str]) -> None:
        self.gone |= kinds
        for kind, wire in self._wires:
            if kind in kinds:
                wire.cut()

    def mend(self) -> None:
        """New connections get through. Those that were cut are over, as the client sees it."""
        for kind, wire in self._wires:
            if kind in self.gone:
                wire.reset()
        self.gone = frozenset()


class _Noting(MemoryStream):
    """Tells the cable what kind of connection it is, by its first bytes."""

    def __init__(self, cable: _Cable, wire: MemoryWire) -> None:
        super().__init__(wire)
        self._cable = cable
        self._begun = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not self._begun:
            self._begun = True
            self._cable.begin(bytes(data).split(b" ")[1].split(b"/")[1].decode(), self.wire)
        await super().send_all(data)
