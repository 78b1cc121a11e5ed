"""The clients of the simulation: players' devices, publishers, operators, strangers.

A device merges its connections by the rule of docs/protocol.rst, written anew here: the oracle must not lean on the
code that it judges. What each connection heard, and what was asked and answered, is kept for the oracle.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any, Final

import trio
import wsproto
from attrs import define, evolve, field

from tests.simulation import plan
from tests.support.play import Client, SSEClient, WebSocketClient

if TYPE_CHECKING:
    from mythos_trio.testing.network import MemoryWire
    from tests.simulation.store import Branch
    from tests.simulation.world import Life, World

GONE = (
    OSError,
    trio.ClosedResourceError,
    trio.BrokenResourceError,
    wsproto.utilities.LocalProtocolError,
    wsproto.utilities.RemoteProtocolError,
)
# Of a connection that is opened, until the first word: JOIN_SECONDS and OPEN_SECONDS of the server, and the cable.
FIRST_WORD_SECONDS = 26.0
# Of a request: five seconds for room, and 30 for the commit; more than any other takes.
ANSWER_SECONDS = 41.0
# Of a change of a player's session, with the wait for the one before it: "busy, try again" by then.
CHANGE_SECONDS = 10.5
# Small pieces up to so many, or a run takes a minute.
SMALL_PIECES = 400


def parse(position: str) -> tuple[int, int]:
    epoch, _, seq = position.partition("-")
    return int(epoch), int(seq)


class Socket(WebSocketClient):
    """One frame after another, though several tasks send; one that is cut off breaks the connection."""

    def __init__(self, wire: MemoryWire) -> None:
        super().__init__(wire)
        self._sending = trio.Lock()

    async def send_all(self, data: bytes) -> None:
        async with self._sending:
            try:
                await super().send_all(data)
            except trio.Cancelled:
                self.wire.reset()
                raise


@define(eq=False)
class Heard:
    """One connection, as its client saw it. *named_in*: the branch in which the named position was learnt."""

    label: str
    terminal: Terminal
    transport: str
    life: Life
    branch: Branch
    client: Client
    named: str | None
    named_in: Branch | None
    wanted: str | None
    replaces: str | None
    opened_at: float
    record: bytearray
    items: list[tuple[float, dict[str, Any]]] = field(factory=list)
    asked: dict[str, int] = field(factory=dict)
    """How often each id was asked on it."""
    open: bool = True
    reachable: bool = True
    code: int | None = None
    newest: int = 0
    cut_for_good: bool = False
    plain: bool = True
    """Nothing was ever done to it that could make it slow."""
    touched_at: float = 0.0
    """When something was last done to its cable."""

    @property
    def player(self) -> str:
        return self.terminal.spec.player

    @property
    def welcomed(self) -> bool:
        return bool(self.items) and self.items[0][1]["type"] == "welcome"

    @property
    def session_id(self) -> str:
        return str(self.items[0][1]["session_id"])

    @property
    def connection_id(self) -> str:
        return str(self.items[0][1]["connection_id"]) if self.welcomed else ""

    @property
    def epoch(self) -> int:
        return int(self.items[0][1]["epoch"])

    @property
    def start(self) -> int:
        """Everything of the session above it follows."""
        for _, item in self.items[1:2]:
            if item["type"] == "gap" and item["reason"] in ("epoch", "future"):
                return parse(item["position"])[1]
        return parse(self.items[0][1]["position"])[1]


@define(eq=False)
class Asked:
    """A command. *replies*: (branch, reply)."""

    id: str
    player: str
    session: str
    content: dict[str, Any]
    kind: str = "command"
    others: list[dict[str, Any]] = field(factory=list)
    """Other contents that came with the same id."""
    tries: int = 0
    unheard: int = 0
    """Tries that had no answer at all, or one that says that it is not known."""
    asked_at: float = 0.0
    replies: list[tuple[Branch, dict[str, Any]]] = field(factory=list)
    done: bool = False


@define(eq=False)
class Stay:
    """The device is in a session, in one life of the store. *first*: the connection that brought it there."""

    session: str
    first: Heard


@define(eq=False)
class Terminal:
    """A device as it runs."""

    spec: plan.Device
    world: World
    chance: random.Random = field(init=False)
    shape: plan.Shape = field(init=False)
    on: bool = False
    epoch: int = 0
    number: int = 0
    branch: Branch | None = None
    session: str | None = None
    stays: list[Stay] = field(factory=list)
    taken: dict[int, dict[str, Any]] = field(factory=dict)
    """Messages by the uid of their fact, in the order in which they were taken."""
    heard: dict[str, Heard] = field(factory=dict)
    """The newest connection of each transport."""
    commands: list[Asked] = field(factory=list)
    acked: tuple[Life | None, str, int] = (None, "", 0)
    acked_at: float = 0.0
    """The largest number that an answered POST acknowledged: (life, session, number)."""
    doze_until: float = 0.0
    _scope: trio.CancelScope = field(factory=trio.CancelScope)
    _opening: str | None = None
    _new_session: str | None = None
    _query: bool = False
    _names: int = 0

    def __attrs_post_init__(self) -> None:
        self.chance = random.Random(f"{self.world.plan.seed}/{self.spec.name}")
        self.shape = plan.Shape(self.spec.name)

    def tell(self, text: str) -> None:
        self.world.tell(f"{self.spec.name}: {text}")

    # On and off.

    def arrive(self, *, fresh: bool = False) -> None:
        if fresh:
            self.depart("close")
            self.epoch = self.number = 0
            self.branch, self.session = None, None
            self.taken = {}
        if self.on:
            return
        self.on = True
        self._scope, self._opening = trio.CancelScope(), None
        self.world.nursery.start_soon(self._live, self._scope, name=f"device {self.spec.name}")

    def begin_session(self, *, ended: bool) -> None:
        """What it has open is given up, and it comes back with a new id, or with one that has ended."""
        if ended:
            known = self.world.life.branch.history.sessions.values()
            over = [s.id for s in known if s.player == self.spec.player and s.end is not None]
            if not over:
                return
            self._new_session = over[-1]
        else:
            self._new_session = f"n{self.world.next_number()}"
        self.tell(f"wants the session {self._new_session}")
        for heard in self.heard.values():
            self._let_go(heard, "close")

    def depart(self, how: str) -> None:
        if not self.on:
            return
        self.tell(f"departs: {how}")
        self.on = False
        for heard in self.heard.values():
            self._let_go(heard, how)
        self._scope.cancel()

    def _let_go(self, heard: Heard, how: str) -> None:
        """The client gives the connection up."""
        wire = heard.client.wire
        if how == "cut" and heard.open:
            self.world.watch_gone(heard, "both")
            heard.cut_for_good = True
            wire.cut()
        elif how == "forget":
            wire.forget()
        elif how == "reset":
            wire.reset()
        elif how == "close":
            wire.close()
        heard.open = False

    async def _live(self, scope: trio.CancelScope) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                for transport in self.spec.transports:
                    nursery.start_soon(self._carry, transport)
                nursery.start_soon(self._nag)

    async def _carry(self, transport: str) -> None:
        """Keep a connection of *transport*."""
        while True:
            if self.spec.names and not self.epoch:
                # Only one of them may name nothing: what the other one names comes with the first welcome.
                while not self.epoch and self._opening not in (None, transport):
                    await trio.sleep(0.05)
                self._opening = transport
            heard = None
            try:
                heard = await self._open(transport)
                if heard is not None:
                    await self._read(heard)
            except GONE:
                pass
            finally:
                if heard is not None:
                    heard.open = False
                    if not self._scope.cancel_called:
                        heard.client.close()
            if self._opening == transport and not self.epoch:
                self._opening = None
            await trio.sleep(self._pause(heard))

    def _pause(self, heard: Heard | None) -> float:
        if heard is not None and heard.code is not None and 4500 <= heard.code < 5000:
            # The end, for the page; the person opens it again.
            if heard.code != 4509:
                self.session = self._new_session = None
            return 1.0 + self.chance.random()
        return 0.1 + 0.4 * self.chance.random()

    # One connection.

    def _target(self, transport: str) -> tuple[str, str | None, str | None, str | None]:
        """(query, position, session, replaces) to be named."""
        named = f"{self.epoch}-{self.number}" if self.spec.names and self.epoch else None
        wanted = self._new_session or (self.session if self.spec.keeps else None)
        former = self.heard.get(transport)
        same = former is not None and former.welcomed and former.life is self.world.life
        replaces = former.connection_id if former is not None and same and self.chance.random() < 0.7 else None
        query: dict[str, str | None] = {"session_id": wanted, "replaces": replaces}
        if named and not (self.spec.header and not self._query):
            query["position"] = named
        self._query = False
        return "&".join(f"{k}={v}" for k, v in query.items() if v is not None), named, wanted, replaces

    def _wire(self, transport: str) -> MemoryWire:
        shape = self.shape
        wire = self.world.life.process.listener.connect(capacity=shape.capacity)
        if shape.most:
            budget = [SMALL_PIECES]

            def most() -> int:
                budget[0] -= 1
                return self.chance.randint(1, shape.most) if budget[0] > 0 else 65536

            wire.crumble(most)
            wire.other.crumble(most)
        if shape.delay and shape.transport == transport:
            wire.delay(shape.delay)
            wire.other.delay(shape.delay)
        return wire

    async def _open(self, transport: str) -> Heard | None:
        world = self.world
        query, named, wanted, replaces = self._target(transport)
        try:
            wire = self._wire(transport)
        except ConnectionRefusedError:
            return None
        life, began = world.life, trio.current_time()
        client: Socket | SSEClient = Socket(wire) if transport == "ws" else SSEClient(wire)
        label = f"{self.spec.name} {transport} {world.next_number()}"
        header = named if named and "position" not in query else None
        self.tell(f"{label} opens {query} {header or ''}")
        heard = Heard(
            label, self, transport, life, life.branch, client, named, self.branch, wanted, replaces, began,
            wire.record(),
        )  # fmt: skip
        heard.plain = self.shape == plan.Shape(self.spec.name) and self.doze_until < began
        self.heard[transport] = heard
        with trio.move_on_after(FIRST_WORD_SECONDS + 4 * self.shape.delay) as patience:
            path = f"/{transport}/{self.spec.player}?{query}"
            if isinstance(client, Socket):
                await client.open(path, headers=[(b"Last-Event-ID", header.encode())] if header else [])
            else:
                await client.open(path, headers=f"Last-Event-ID: {header}\r\n" if header else "")
        if patience.cancelled_caught and heard.plain and not life.ending:
            world.broken("answered", "a connection has its first word in time", connection=label)
        if client.status not in (101, 200):
            self.tell(f"{label}: {client.status}")
            if client.status == 204:
                self.session, self._new_session, self._query = None, None, True
                heard.code = 4501
                world.refused(heard, 204)
            elif not client.status and not (heard.touched_at or self.shape.delay or self.shape.most):
                world.check_answered(life, began, label)
            client.close()
            return heard if client.status == 204 else None
        world.heard.append(heard)
        return heard

    async def _read(self, heard: Heard) -> None:
        silence = 10.0 + 2 * self.shape.delay
        while True:
            await trio.sleep_until(self.doze_until)
            with trio.move_on_after(silence if heard.items else FIRST_WORD_SECONDS) as quiet:
                message = await heard.client.next()
            if quiet.cancelled_caught:
                self.tell(f"{heard.label} hears nothing")
                if not heard.items and heard.plain and not heard.life.ending:
                    self.world.broken("answered", "a connection has its first word in time", connection=heard.label)
                return
            if message["type"] == "closed":
                if heard.code is None:
                    heard.code = message.get("code")
                self.tell(f"{heard.label} ended {heard.code}")
                return
            heard.items.append((trio.current_time(), message))
            self._hear(heard, message)

    # What is heard.

    def _hear(self, heard: Heard, message: dict[str, Any]) -> None:
        kind = message["type"]
        if "seq" in message:
            self.world.tell(f"{heard.label} < {message['seq']} {kind} {str(message['content'])[:60]}")
            self._take(heard, message)
            return
        self.world.tell(f"{heard.label} < {json.dumps(message)[:160]}")
        if kind == "welcome":
            self._welcomed(heard)
        elif kind == "gap" and self.spec.names:
            self._gap(heard, message)
        elif kind == "heartbeat" and self.spec.names:
            epoch, seq = parse(message["position"])
            if epoch == self.epoch:
                self.number = max(self.number, seq)
        elif kind == "reply":
            self._replied(message, heard, heard.life)
        elif kind == "disconnect":
            heard.code = message["code"]
            if not heard.welcomed:
                self.world.refused(heard, message["code"])

    def _welcomed(self, heard: Heard) -> None:
        if not self.spec.names or not self.epoch:
            self.epoch, self.number = heard.epoch, parse(heard.items[0][1]["position"])[1]
            self.branch = heard.branch
        if self.session != heard.session_id or not self.stays:
            self.stays.append(Stay(heard.session_id, heard))
        self.session = heard.session_id
        if self.session == self._new_session:
            self._new_session = None
        for asked in self.commands:
            if not asked.done and asked.session == self.session:
                self.world.nursery.start_soon(self._ask_again, asked, heard.transport)

    def _gap(self, heard: Heard, gap: dict[str, Any]) -> None:
        epoch, seq = parse(gap["position"])
        if gap["reason"] == "epoch" and epoch > self.epoch:
            self.epoch, self.number, self.branch = epoch, min(self.number, gap["shared"]), heard.branch
            self.stays.append(Stay(heard.session_id, heard))
        elif gap["reason"] == "future" and (self.epoch, self.number) == parse(gap["after"]):
            self.epoch, self.number, self.branch = epoch, seq, heard.branch
            self.stays.append(Stay(heard.session_id, heard))

    def _take(self, heard: Heard, message: dict[str, Any]) -> None:
        seq = message["seq"]
        if seq <= heard.newest:
            # Here and now: the same may come without end.
            self.world.broken("own stream", "numbers strictly increase", on=heard.label, last=heard.newest, got=message)
        heard.newest = seq
        uid = heard.branch.uids.get(seq)
        if uid is None or heard.branch.stored_at[seq] > trio.current_time():
            self.world.broken("stored first", "nobody is sent what is not stored", on=heard.label, message=message)
            return
        if self.spec.names:
            if heard.epoch != self.epoch or seq <= self.number:
                return
            if uid in self.taken:
                self.world.broken("once", "a device takes each message once", on=heard.label, message=message)
        self.number = seq
        self.taken[uid] = message

    # Commands.

    async def say(self, do: str, n: int, by: str) -> None:
        await self._give(self._new_id(), "command", {"do": do, "n": n}, by)

    async def subscribe(self, channel: str, *, on: bool, by: str) -> None:
        if by == "post" or "ws" not in self.spec.transports:
            kind = "subscribe" if on else "unsubscribe"
            await self.world.operators.subscriptions(self.spec.player, {kind: [channel]})
        else:
            await self._give(self._new_id(), "subscribe" if on else "unsubscribe", {"channel": channel}, "ws")

    def _new_id(self) -> str:
        self._names += 1
        return f"{self.spec.name}.{self._names}"

    async def _give(self, id: str, kind: str, content: dict[str, Any], by: str) -> None:
        if self.session is None:
            return
        asked = Asked(id, self.spec.player, self.session, content, kind)
        self.commands.append(asked)
        self.world.commands.append(asked)
        await self._ask(asked, by)

    async def again(self, by: str, *, other: bool) -> None:
        """The newest command of this session once more."""
        known = [asked for asked in self.commands if asked.session == self.session and asked.kind == "command"]
        if known:
            content = known[-1].content | {"n": 77} if other else None
            if content is not None:
                known[-1].others.append(content)
            await self._ask(known[-1], by, content)

    async def _ask_again(self, asked: Asked, transport: str) -> None:
        await self._ask(asked, "ws" if transport == "ws" or self.chance.random() < 0.5 else "post")

    async def _nag(self) -> None:
        """Who has no reply asks again."""
        while True:
            await trio.sleep(3.0)
            now = trio.current_time()
            for asked in self.commands:
                if not asked.done and asked.session == self.session and now - asked.asked_at > 6.0:
                    await self._ask(asked, "ws")

    async def _ask(self, asked: Asked, by: str, content: dict[str, Any] | None = None) -> None:
        asked.tries += 1
        asked.asked_at = trio.current_time()
        said = content or asked.content
        request = {"type": asked.kind, "id": asked.id} | (said if asked.kind != "command" else {"content": said})
        heard = self.heard.get("ws")
        usable = heard is not None and heard.open and heard.welcomed and heard.session_id == asked.session
        if heard is not None and usable and (by == "ws" or asked.kind != "command"):
            self.tell(f"{heard.label} > {request}")
            heard.asked[asked.id] = heard.asked.get(asked.id, 0) + 1
            asked.unheard += 1
            try:
                with trio.move_on_after(5):
                    assert isinstance(heard.client, Socket)
                    await heard.client.say(request)
            except GONE:
                pass
            return
        if asked.kind != "command":
            return
        answer = await self.world.request(
            "POST", f"/api/connections/{self.spec.player}/commands", request | {"session_id": asked.session}
        )
        if answer is None or (answer[0] != 200 and answer[1].get("type") != "reply"):
            asked.unheard += 1
        else:
            self._replied(answer.body, None, answer.life)

    def _replied(self, reply: dict[str, Any], heard: Heard | None, life: Life) -> None:
        for asked in self.commands:
            if asked.id != reply["id"]:
                continue
            if heard is not None:
                asked.unheard -= 1
            asked.replies.append((life.branch, reply))
            if self.spec.loses and len(asked.replies) == 1:
                self.world.nursery.start_soon(self._ask_again, asked, "sse")
            else:
                error = reply.get("error", {}).get("error_type")
                asked.done = asked.done or error not in ("persistence_error", "capacity_error", "session_error")
                asked.done = asked.done and not (error == "system_error" and "restarting" in reply["error"]["message"])

    # Acknowledgements, cables.

    async def ack(self, by: str) -> None:
        if not self.epoch or self.session is None or (self.spec.names is False and not self.taken):
            return
        number, position = self.number, f"{self.epoch}-{self.number}"
        self.world.claim(self, number)
        heard = self.heard.get("ws")
        if by == "ws" and heard is not None and heard.open and heard.welcomed:
            self.tell(f"acks {position}")
            try:
                with trio.move_on_after(5):
                    assert isinstance(heard.client, Socket)
                    await heard.client.say({"type": "ack", "position": position})
            except GONE:
                pass
            return
        life, session = self.world.life, self.session
        body = {"position": position, "session_id": session}
        answer = await self.world.request("POST", f"/api/connections/{self.spec.player}/ack", body)
        if answer is not None and answer.status == 200 and answer.life is life:
            self.acked_at = trio.current_time()
            self.acked = (life, session, max(number, self.acked[2] if self.acked[:2] == (life, session) else 0))

    async def doze(self, seconds: float) -> None:
        self.doze_until = trio.current_time() + seconds
        for heard in self.heard.values():
            heard.plain = False
        await trio.sleep(seconds)

    async def cable(self, transport: str, what: str, seconds: float) -> None:
        heard = self.heard.get(transport)
        if heard is None or not heard.open:
            return
        self.tell(f"{heard.label}: {what} for {seconds:g} s")
        heard.touched_at = trio.current_time()
        heard.reachable = heard.plain = False
        wire = heard.client.wire
        match what:
            case "cut":
                self.world.watch_gone(heard, "both")
                wire.cut()
            case "stall down":
                self.world.watch_gone(heard, "down")
                wire.other.stall()
            case "stall up":
                self.world.watch_gone(heard, "up")
                wire.stall()
            case _:
                self._let_go(heard, what)
                return
        with trio.move_on_after(seconds):
            await self.world.peace.wait()
        if heard.cut_for_good:
            return
        wire.mend()
        heard.touched_at = trio.current_time()
        heard.reachable = True


@define(eq=False)
class Publication:
    """*said*: (branch, status, body of the answer), one for each request that was answered."""

    items: list[dict[str, Any]]
    named: bool
    at: float
    said: list[tuple[Branch, int, Any]] = field(factory=list)
    unheard: int = 0
    others: int = 0
    """Requests that had the same id and another content."""


# What a request says that has the ids of another one.
OTHER: Final = "other"


@define(eq=False)
class Publishers:
    world: World
    publications: list[Publication] = field(factory=list)

    async def publish(self, step: plan.Publish) -> None:
        items = []
        for target in step.to:
            number = self.world.next_number()
            message: dict[str, Any] = {"type": "note", "content": f"{number}{'.' * step.size}"}
            if step.id == "new":
                message["id"] = f"p{number}"
            if step.key:
                message["replace_key"] = step.key
            items.append(self._where(target) | {"message": message})
        publication = Publication(items, step.id == "new", trio.current_time())
        self.publications.append(publication)
        lost = step.lost
        for _ in range(60):
            known = await self._ask(publication, items, lost)
            if known or not publication.named:
                return
            lost = -1
            await trio.sleep(1.0)

    @staticmethod
    def _where(target: str) -> dict[str, Any]:
        if target == "*":
            return {"broadcast": True}
        return {"player_id" if target[0] == "@" else "channel": target[1:]}

    async def repeat(self, *, other: bool) -> None:
        known = [p for p in self.publications if p.named]
        if not known:
            return
        items = known[-1].items
        if other:
            known[-1].others += 1
            items = [item | {"message": item["message"] | {"content": OTHER}} for item in items]
            await self.world.request("POST", "/api/messages", items if len(items) > 1 else items[0])
        else:
            await self._ask(known[-1], items, -1)

    async def _ask(self, publication: Publication, items: list[dict[str, Any]], lost: int) -> bool:
        """Whether it is known what became of it."""
        body = items if len(items) > 1 else items[0]
        answer = await self.world.request("POST", "/api/messages", body, lost=lost)
        if answer is None:
            publication.unheard += 1
            return False
        status, said = answer.status, answer.body
        if status not in (202, 409, 503):
            self.world.broken("answered", "a publication has a known answer", answer=answer)
        if status == 503 and "not known" in said["message"]:
            publication.unheard += 1
        else:
            publication.said.append((answer.life.branch, status, said))
        if status == 202:
            self.world.accepted(items, said if isinstance(said, list) else [said], answer.life)
        return bool(status in (202, 409))


@define(eq=False)
class Operators:
    """Who asks the API, and strangers."""

    world: World

    async def switch(self, player: str, wanted: str) -> None:
        world = self.world
        history = world.life.branch.history
        ended = [s.id for s in history.sessions.values() if s.player == player and s.end is not None]
        named = {"none": None, "new": f"s{world.next_number()}", "ended": ended[-1] if ended else None}[wanted]
        body = {} if named is None else {"session_id": named}
        answer = await world.request("POST", f"/api/connections/{player}/session", body)
        if answer is not None and answer[0] in (200, 201) and wanted == "ended" and named is not None:
            world.broken("ended for good", "an id that has ended never begins again", id=named, answer=answer)

    async def remove(self, player: str, transport: str) -> None:
        path = f"/api/connections/{player}"
        if transport:
            mine = [t for t in self.world.terminals if t.spec.player == player]
            heard = next((t.heard[transport] for t in mine if transport in t.heard), None)
            if heard is None or not heard.connection_id:
                return
            path += "/" + heard.connection_id
        await self.world.request("DELETE", path)

    async def subscriptions(self, player: str, body: dict[str, Any]) -> None:
        await self.world.request("POST", f"/api/connections/{player}/subscriptions", body)

    async def stranger(self, what: str, seconds: float) -> None:
        try:
            wire = self.world.life.process.listener.connect()
        except ConnectionRefusedError:
            return
        said = {
            "silent": b"",
            "half": b"GET /ws/ann HTTP/1.1\r\nHost: loc",
            "garbage": b"\x16\x03\x01 what?\r\n\r\n",
            "body": b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        }[what]
        client = Client(wire)
        try:
            await client.send_all(said)
            with trio.move_on_after(seconds):
                while await client.receive():
                    pass
        except GONE:
            pass
        client.close()


__all__ = ["Asked", "Heard", "Operators", "Publication", "Publishers", "Socket", "Stay", "Terminal", "evolve", "parse"]
