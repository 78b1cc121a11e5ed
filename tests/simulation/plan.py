"""What happens in a run: devices, settings, and steps with their times, drawn from a seed.

A plan is a value whose repr is Python. All that it leaves open (how long a disk takes, in which order tasks run)
comes from its seed too, so the same plan is the same run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from tests.simulation.world import World

PLAYERS: Final = ("ann", "bob", "cid")
TRANSPORTS: Final = ("ws", "sse")
TARGETS: Final = ("@ann", "@ann", "@bob", "@cid", "#c1", "#c2", "*")


class Step(Protocol):
    async def play(self, world: World) -> None: ...


@frozen
class Device:
    """A client program of a player's.

    *names*: it keeps one number and one epoch for all its connections, and names them; else it names nothing, and
    has one connection. *keeps*: it names its session. *acks*: it acknowledges now and then. *loses*: it takes no
    notice of the first reply to a command, and asks again.
    """

    name: str
    player: str
    transports: tuple[str, ...] = TRANSPORTS
    names: bool = True
    keeps: bool = True
    acks: bool = False
    loses: bool = False
    header: bool = False
    """Positions go in ``Last-Event-ID``."""


@frozen
class Plan:
    seed: int
    devices: tuple[Device, ...]
    steps: tuple[tuple[float, Step], ...]
    settings: Mapping[str, Any]

    @property
    def text(self) -> str:
        lines = [f"seed {self.seed}, {dict(self.settings)}"]
        lines += [str(device) for device in self.devices]
        lines += [f"{at:7.2f}  {step}" for at, step in self.steps]
        return "\n".join(lines)


# What clients do.


@frozen
class Arrive:
    """The device is switched on. *fresh*: it remembers nothing."""

    device: str
    fresh: bool = False

    async def play(self, world: World) -> None:
        world.devices[self.device].arrive(fresh=self.fresh)


@frozen
class NewSession:
    """The device leaves its session: it connects with an id that there never was; *ended*: with one that has ended,
    as a browser's own reconnect does."""

    device: str
    ended: bool = False

    async def play(self, world: World) -> None:
        world.devices[self.device].begin_session(ended=self.ended)


@frozen
class Depart:
    """The device is switched off. *how*: close, reset, forget (its machine is gone without a word), cut."""

    device: str
    how: str = "close"

    async def play(self, world: World) -> None:
        world.devices[self.device].depart(self.how)


@frozen
class Cable:
    """Something happens to a connection: cut and stalls for so many seconds; reset, close, forget.

    ``stall down`` is what the server sends, ``stall up`` what the client sends.
    """

    device: str
    transport: str
    what: str
    seconds: float = 0.0

    async def play(self, world: World) -> None:
        await world.devices[self.device].cable(self.transport, self.what, self.seconds)


@frozen
class Shape:
    """From now on the device's connections are like this: *capacity* of the sockets in bytes, *most* bytes at once,
    *delay* of one transport in seconds: so the two are out of step."""

    device: str
    capacity: int = 65536
    most: int = 0
    delay: float = 0.0
    transport: str = "ws"

    async def play(self, world: World) -> None:
        world.devices[self.device].shape = self


@frozen
class Doze:
    """The device does not read for so long."""

    device: str
    seconds: float

    async def play(self, world: World) -> None:
        await world.devices[self.device].doze(self.seconds)


@frozen
class Say:
    """A command, by ws or post; without a WebSocket by post anyway."""

    device: str
    do: str
    n: int = 1
    by: str = "ws"

    async def play(self, world: World) -> None:
        await world.devices[self.device].say(self.do, self.n, self.by)


@frozen
class Again:
    """The newest command once more, with the same id, though it may have its answer; *other*: with other content."""

    device: str
    by: str = "ws"
    other: bool = False

    async def play(self, world: World) -> None:
        await world.devices[self.device].again(self.by, other=self.other)


@frozen
class Subscribe:
    device: str
    channel: str
    on: bool = True
    by: str = "ws"

    async def play(self, world: World) -> None:
        await world.devices[self.device].subscribe(self.channel, on=self.on, by=self.by)


@frozen
class Ack:
    device: str
    by: str = "ws"

    async def play(self, world: World) -> None:
        await world.devices[self.device].ack(self.by)


@frozen
class Publish:
    """*to*: several are a batch. *id*: ``new`` or ``none``; with an id the publisher asks again until it knows.

    *lost*: it goes away so many checkpoints after its first request. *key*: ``replace_key``. *size*: of the
    content, in bytes.
    """

    to: tuple[str, ...]
    id: str = "new"
    lost: int = -1
    key: str = ""
    size: int = 0

    async def play(self, world: World) -> None:
        await world.publishers.publish(self)


@frozen
class Repeat:
    """The newest publication with an id once more; *other*: with another content."""

    other: bool = False

    async def play(self, world: World) -> None:
        await world.publishers.repeat(other=self.other)


# What operators do.


@frozen
class Switch:
    """POST …/session; *wanted*: a new id, one that the server makes up, or one that has ended."""

    player: str
    wanted: str = "new"

    async def play(self, world: World) -> None:
        await world.operators.switch(self.player, self.wanted)


@frozen
class Remove:
    """DELETE the player, or one of a device's connections."""

    player: str
    transport: str = ""

    async def play(self, world: World) -> None:
        await world.operators.remove(self.player, self.transport)


@frozen
class Stranger:
    """Somebody connects and does not behave: *what*: silent, half (a head), garbage, body (half of one)."""

    what: str
    seconds: float = 1.0

    async def play(self, world: World) -> None:
        await world.operators.stranger(self.what, self.seconds)


# What befalls the machine.


@frozen
class BadDisk:
    """*what*: slow, failing, full, blind (reads fail too), before or after (a commit hangs before or after it)."""

    what: str
    seconds: float

    async def play(self, world: World) -> None:
        await world.bad_disk(self.what, self.seconds)


@frozen
class Flush:
    """The system writes to the disk what it has; a power cut afterwards spares that."""

    async def play(self, world: World) -> None:
        world.flush()


@frozen
class Backup:
    """An operator copies the files."""

    async def play(self, world: World) -> None:
        world.backup()


@frozen
class End:
    """The server's life ends, and the next begins *down* seconds later.

    *how*: kill, power (a power cut), drain, restore (killed, and the oldest backup is put back).
    *when*: now, or commit: just when the next commit has been made, and nobody knows.
    """

    how: str
    down: float = 0.5
    when: str = "now"

    async def play(self, world: World) -> None:
        await world.end_life(self.how, self.down, self.when)


@frozen
class Jump:
    """The wall clock is set."""

    seconds: float

    async def play(self, world: World) -> None:
        world.tell(f"the clock jumps {self.seconds:g} s")
        world.clock.jump(self.seconds)


# Drawing.

# A number among the steps is a pause, in seconds.
Draw = Callable[[random.Random, Sequence[Device]], Sequence[Step | float]]


def _device(chance: random.Random, devices: Sequence[Device]) -> str:
    return chance.choice(devices).name


def _way(chance: random.Random) -> str:
    return chance.choice(("ws", "ws", "post"))


def _say(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    do = chance.choice(
        ("act", "act", "act", "slow", "look", "shout", "shout", "many", "join", "leave", "fight", "dawn")
    )
    n = {"many": chance.randint(1, 12), "fight": chance.randint(1, 6)}.get(do, chance.randint(1, 9))
    return [Say(_device(chance, devices), do, n, _way(chance))]


def _burst(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    device = _device(chance, devices)
    return [Say(device, chance.choice(("act", "look", "act")), 1, _way(chance)) for _ in range(chance.randint(3, 8))]


def _trouble(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    return [Say(_device(chance, devices), chance.choice(("hang", "raise", "refuse")), 1, _way(chance))]


def _publish(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    to = tuple(chance.choice(TARGETS) for _ in range(chance.choice((1, 1, 1, 1, 3, 8))))
    key = chance.choice(("", "", "", "", "hp"))
    lost = chance.choice((-1, -1, -1, 0, 3, 20))
    return [Publish(to, chance.choice(("new", "new", "none")), lost, key, chance.choice((0, 0, 200, 3000)))]


def _flood(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    player = chance.choice(devices).player
    size = chance.choice((100, 1000, 8000))
    return [Publish(("@" + player,) * chance.randint(2, 12), "new", -1, "", size) for _ in range(chance.randint(1, 4))]


def _subscribe(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    channel, on = chance.choice(("c1", "c1", "c2")), chance.random() < 0.75
    return [Subscribe(_device(chance, devices), channel, on, _way(chance))]


def _cable(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    device = chance.choice(devices)
    transport = chance.choice(device.transports)
    what = chance.choice(("cut", "cut", "stall down", "stall up", "reset", "close", "forget"))
    return [Cable(device.name, transport, what, chance.choice((0.2, 1.0, 3.0, 9.0, 30.0)))]


def _cut_welcome(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    """A device comes, and loses what it is told in its first moments."""
    device = chance.choice(devices)
    transport = chance.choice(device.transports)
    what = chance.choice(("cut", "stall down", "reset", "forget"))
    return [Depart(device.name, "close"), Arrive(device.name), Cable(device.name, transport, what, 4.0)]


def _cut_and_publish(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    """What is sent into a cut cable has not arrived."""
    device = chance.choice(devices)
    transport = chance.choice(device.transports)
    what = chance.choice(("cut", "cut", "stall down", "forget"))
    return [
        Cable(device.name, transport, what, chance.choice((9.0, 30.0))),
        *(Publish(("@" + device.player,)) for _ in range(chance.randint(1, 3))),
    ]


def _gap_at_welcome(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    """More mail than is kept, and whoever comes for it loses the first words."""
    device = chance.choice([device for device in devices if not device.names] or devices)
    transport = chance.choice(device.transports)
    others = [Depart(other.name) for other in devices if other.player == device.player]
    return [
        *others,
        Publish(("@" + device.player,) * chance.randint(5, 10)),
        5.0,
        # The request is there after 0.4 seconds, the answer after 0.8.
        Shape(device.name, delay=0.4, transport=transport),
        Arrive(device.name),
        chance.choice((0.4, 0.45, 0.6, 0.79)),
        Cable(device.name, transport, chance.choice(("cut", "stall down", "forget")), 60.0),
    ]


def _glut(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    """More than the socket of a client takes that does not read."""
    device = chance.choice([device for device in devices if "ws" in device.transports] or devices)
    return [
        Shape(device.name, chance.choice((300, 1000)), chance.choice((0, 50))),
        Depart(device.name),
        Arrive(device.name),
        1.0,
        Doze(device.name, chance.choice((3.0, 8.0))),
        Publish(("@" + device.player,) * 8, size=chance.choice((200, 1000))),
        Say(device.name, "look"),
        chance.choice((0.0, 1.0)),
        Say(device.name, "act"),
        Say(device.name, "look", by="post"),
    ]


def _ask_and_end(how: str) -> Draw:
    """The end comes while somebody waits for an answer."""

    def draw(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
        asks: Sequence[Step] = (
            Publish((chance.choice(TARGETS),)),
            Say(_device(chance, devices), chance.choice(("act", "slow", "many")), 3, _way(chance)),
            Publish(("*", "@ann"), "none"),
        )
        slow: Sequence[Step] = [BadDisk("slow", 3.0)] if chance.random() < 0.5 else []
        return [
            *slow,
            *chance.sample(asks, 2),
            chance.choice((0.0, 0.005, 0.3)),
            End(how, chance.choice((0.0, 0.5))),
        ]

    return draw


def _shape(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    capacity = chance.choice((300, 1000, 4000, 65536))
    most = chance.choice((0, 0, 1, 7, 100))
    delay = chance.choice((0.0, 0.05, 0.4, 1.5))
    return [Shape(_device(chance, devices), capacity, most, delay, chance.choice(TRANSPORTS))]


def _come_and_go(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    device = _device(chance, devices)
    if chance.random() < 0.5:
        return [Arrive(device, chance.random() < 0.2)]
    return [Depart(device, chance.choice(("close", "reset", "forget", "cut")))]


def _switch(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    player = chance.choice(devices).player
    return [
        chance.choice(
            (
                Switch(player, chance.choice(("new", "new", "none", "ended"))),
                Say(_device(chance, devices), "renew"),
                Remove(player),
                Remove(player, chance.choice(TRANSPORTS)),
                Say(_device(chance, devices), "kick"),
                Arrive(_device(chance, devices), fresh=True),
                NewSession(_device(chance, devices)),
                NewSession(_device(chance, devices)),
                NewSession(_device(chance, devices), ended=True),
                NewSession(_device(chance, devices), ended=True),
            )
        )
    ]


def _disk(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
    what = chance.choice(("slow", "slow", "failing", "full", "blind", "before", "after"))
    return [BadDisk(what, chance.choice((0.3, 1.0, 3.0, 7.0)))]


def _end(how: str) -> Draw:
    def draw(chance: random.Random, devices: Sequence[Device]) -> Sequence[Step | float]:
        when = "now" if how == "drain" else chance.choice(("now", "commit", "commit"))
        return [End(how, chance.choice((0.0, 0.1, 0.5, 3.0)), when)]

    return draw


# What a run may be about: a family is in it or not, and how often each of its steps comes.
ALWAYS: Final[Sequence[tuple[int, Draw]]] = (
    (6, _say),
    (6, _publish),
    (2, _subscribe),
    (2, lambda c, d: [Ack(_device(c, d), _way(c))]),
    (2, _come_and_go),
)
# Two copies are put back, and in between the clock is set back: then an epoch may come again, and nobody can know.
RESTORE: Final[Sequence[tuple[int, Draw]]] = ((1, lambda c, d: [Backup()]), (1, _end("restore")))
LOSSES: Final[Sequence[tuple[int, Draw]]] = ((1, _cut_welcome), (1, _cable), (4, _gap_at_welcome))
FAMILIES: Final[Sequence[Sequence[tuple[int, Draw]]]] = (
    ((5, _cable), (1, _cut_welcome), (2, _cut_and_publish)),
    LOSSES,
    ((2, _shape), (2, _flood), (4, _glut), (1, lambda c, d: [Doze(_device(c, d), c.choice((0.5, 3.0, 8.0)))])),
    ((4, _burst), (3, lambda c, d: [Again(_device(c, d), _way(c), c.random() < 0.1)])),
    ((3, _trouble),),
    ((4, _switch),),
    ((3, _disk),),
    ((2, _end("kill")), (1, _ask_and_end("kill"))),
    ((1, _end("drain")), (3, _ask_and_end("drain"))),
    ((2, _end("power")), (1, _ask_and_end("power")), (1, lambda c, d: [Flush()])),
    RESTORE,
    ((1, lambda c, d: [Jump(c.choice((-3600.0, -5.0, 5.0, 3600.0)))]),),
    ((1, lambda c, d: [Stranger(c.choice(("silent", "half", "garbage", "body")), c.choice((0.1, 2.0, 30.0)))]),),
    ((2, lambda c, d: [Repeat(c.random() < 0.2)]),),
)

SETTINGS: Final[Mapping[str, Any]] = {
    "linkdead_grace": 5.0,
    "handler_timeout": 2.0,
    "health_check_interval": 4.0,
    "pong_timeout": 3.0,
    "cleanup_interval": 4.0,
    "drain_timeout": 8.0,
    "write_timeout": 2.0,
    "rate_limit_requests": 100_000,
}


def draw_plan(seed: int) -> Plan:
    """The plan of *seed*."""
    chance = random.Random(seed)
    devices = _devices(chance)
    families = chance.sample(FAMILIES, chance.randint(2, 6))
    weighted = [*ALWAYS, *((2 * weight, draw) for family in families for weight, draw in family)]
    draws, weights = [draw for _, draw in weighted], [weight for weight, _ in weighted]
    at = 0.0
    steps: list[tuple[float, Step]] = [(0.0, Arrive(device.name)) for device in devices if chance.random() < 0.8]
    forward = RESTORE in families
    wanted = chance.randint(10, 30)
    while len(steps) < wanted:
        # Often nothing lies between two steps: then the order of tasks says how far the first one gets.
        at += chance.choice((0.0, 0.0, 0.0, 0.001, 0.02, 0.3, 1.0, 2.5, 6.0))
        for step in chance.choices(draws, weights)[0](chance, devices):
            if isinstance(step, float):
                at += step
                continue
            if isinstance(step, Jump) and forward:
                step = Jump(abs(step.seconds))
            steps.append((round(at, 3), step))
            at += chance.choice((0.0, 0.0, 0.0, 0.005, 0.2))
    settings = dict(SETTINGS)
    settings["durability"] = chance.choice(("process", "process", "power"))
    if chance.random() < 0.5 or LOSSES in families:
        settings["message_retention_count"] = chance.randint(3, 8)
    return Plan(seed, devices, tuple(steps), settings)


def _devices(chance: random.Random) -> tuple[Device, ...]:
    devices = []
    for player in PLAYERS[: chance.randint(1, 3)]:
        for number in range(chance.choice((1, 1, 2))):
            names = chance.random() < 0.6
            transports: tuple[str, ...] = (chance.choice(TRANSPORTS),)
            if names and chance.random() < 0.7:
                transports = TRANSPORTS
            devices.append(
                Device(
                    f"{player}{number}",
                    player,
                    transports,
                    names,
                    keeps=chance.random() < 0.6,
                    acks=chance.random() < 0.4,
                    loses=chance.random() < 0.2,
                    header=chance.random() < 0.3,
                )
            )
    return tuple(devices)
