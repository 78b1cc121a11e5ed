"""A game that does as it is told, and a disk that has bad days: for scenes with a whole server."""

from __future__ import annotations

from typing import Any

import trio
from attrs import define, field

from mythos_trio.game import Command, CommandError, Game, Player
from mythos_trio.storage import StoreError


class Puppet(Game):
    """Each command is a word and what it is about.

    ==================  ==================================================================
    ``echo X``          the reply is X; nothing else happens
    ``line X``          the player is sent a ``line`` X; so is the reply
    ``lines N``         N lines
    ``tell P X``        player P is sent X
    ``shout C X``       X goes to channel C
    ``join C``          subscribes to C
    ``leave C``         unsubscribes from C
    ``wait X``          waits for `open_gate` of X, then sends the line X
    ``sleep N``         takes N seconds, then sends the line "slept"
    ``raise``           raises; ``refuse`` raises a `CommandError`; after a line, that must not come
    ``nonsense``        a line, and an answer that is no JSON
    ``switch``          a line, and a new session
    ``kick``            a line, and the end of all connections
    ==================  ==================================================================
    """

    def __init__(self) -> None:
        self.ran: list[Any] = []
        """The commands that were begun, also those that failed later."""
        self.told: list[str] = []
        """What was told of presence: "join alice"."""
        self.gates: dict[str, trio.Event] = {}
        self.presence_raises = False
        self.presence_line = False

    def gate(self, name: str) -> trio.Event:
        return self.gates.setdefault(name, trio.Event())

    async def on_join(self, player: Player) -> None:
        await self._tell("join", player)

    async def on_linkdead(self, player: Player) -> None:
        await self._tell("linkdead", player)

    async def on_return(self, player: Player) -> None:
        await self._tell("return", player)

    async def on_leave(self, player: Player, reason: str) -> None:
        await self._tell(f"leave ({reason})", player)

    async def _tell(self, what: str, player: Player) -> None:
        self.told.append(f"{what} {player.id}")
        if self.presence_line:
            player.world.broadcast("presence", f"{what} {player.id}")
        if self.presence_raises:
            raise RuntimeError(f"{what} went wrong, on purpose")

    async def on_subscribe(self, player: Player, channel: str) -> bool:
        return not channel.startswith("secret")

    async def on_command(self, player: Player, command: Command) -> Any:
        self.ran.append(command.content)
        verb, _, rest = command.text.partition(" ")
        handler = getattr(self, f"do_{verb}", None)
        if handler is None:
            return {"heard": command.content}
        return await handler(player, rest)

    async def do_echo(self, player: Player, text: str) -> str:
        return text

    async def do_line(self, player: Player, text: str) -> str:
        player.send("line", text)
        return text

    async def do_lines(self, player: Player, count: str) -> None:
        for number in range(int(count)):
            player.send("line", number)

    async def do_tell(self, player: Player, rest: str) -> None:
        whom, _, text = rest.partition(" ")
        player.world.send(whom, "line", text)

    async def do_shout(self, player: Player, rest: str) -> None:
        channel, _, text = rest.partition(" ")
        player.world.publish(channel, "line", text)

    async def do_join(self, player: Player, channel: str) -> None:
        player.subscribe(channel)

    async def do_leave(self, player: Player, channel: str) -> None:
        player.unsubscribe(channel)

    async def do_wait(self, player: Player, name: str) -> str:
        await self.gate(name).wait()
        player.send("line", name)
        return name

    async def do_sleep(self, player: Player, seconds: str) -> None:
        await trio.sleep(float(seconds))
        player.send("line", "slept")

    async def do_raise(self, player: Player, text: str) -> None:
        player.send("line", "this must not come")
        raise RuntimeError("on purpose")

    async def do_refuse(self, player: Player, text: str) -> None:
        player.send("line", "this must not come")
        raise CommandError("You cannot.", why=text)

    async def do_nonsense(self, player: Player, text: str) -> object:
        player.send("line", "this must not come")
        return object()

    async def do_switch(self, player: Player, text: str) -> None:
        player.send("line", "switching")
        player.new_session()

    async def do_kick(self, player: Player, text: str) -> None:
        player.send("line", "kicked")
        player.disconnect("you were kicked")


@define
class Disk:
    """A hook for `InlineRunner`: the store's bad days."""

    write_seconds: float = 0.0
    read_seconds: float = 0.0
    broken: bool = False
    """Writes and reads fail."""
    no_writes: bool = False
    hangs: bool = False
    """Writes wait until it is mended."""
    writes: int = 0
    reads: int = 0
    _mended: trio.Event = field(factory=trio.Event)

    async def __call__(self, kind: str) -> None:
        await trio.lowlevel.checkpoint()
        if kind == "read":
            self.reads += 1
            await trio.sleep(self.read_seconds)
        else:
            await self._write()
        if self.broken or (self.no_writes and kind == "write"):
            raise StoreError("the disk is broken, on purpose")

    async def _write(self) -> None:
        self.writes += 1
        if self.write_seconds:
            await trio.sleep(self.write_seconds)
        while self.hangs:
            await self._mended.wait()

    def mend(self) -> None:
        self.write_seconds = self.read_seconds = 0.0
        self.broken = self.no_writes = self.hangs = False
        self._mended.set()
        self._mended = trio.Event()
