"""The rules that every run is held against.

They are judged from three sides: every commit as it was stored, what clients were answered, and what each of
their connections heard. `RULES` has them in words; docs/reliability.rst lists the same.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import trio
from attrs import define, field

from mythos_trio.core.data import player_key
from tests.simulation.clients import OTHER, Asked, Heard, Stay, Terminal, parse
from tests.simulation.game import DAYS
from tests.simulation.store import Branch, rows
from tests.support.model import Fact, SessionFacts

if TYPE_CHECKING:
    from tests.simulation.world import Life, World

RULES: Final = {
    "stored first": "Nobody is sent what is not stored, and a message is what was stored.",
    "own stream": "A connection carries its session's own stream, in order, nothing twice.",
    "nothing lost": "Between a connection's start and what it is told, all of the stream has come, or a gap was told.",
    "gap": "A gap is told exactly where something is missing, and nowhere else.",
    "new epoch": "A life of the store that may lack the end of the former has an epoch of its own; no other has.",
    "once": "A device that merges by the rule takes each message once.",
    "all of it": "At rest such a device has all of its session's stream since it came into it.",
    "seen": "What counts as seen has arrived, or a client has said so; what was acknowledged counts.",
    "accepted": "What was answered 202 is stored as it was said, once; what was refused is not.",
    "durable": "With DURABILITY=power nothing that was answered or sent is lost by a power cut.",
    "effects": "The effects of each command exist once or not at all, as its answer says; each id has one answer.",
    "data": "The game's data is what the stored commands and timers made it.",
    "timers": "Each timer has fired once, in its turn, however often the server died.",
    "presence": "What the game is told of a player's presence alternates, and is told in the end.",
    "one session": "A player has at most one current session, and the live one is it.",
    "ended for good": "The id of a session that has ended never begins again.",
    "answered": "Who asks is answered, in time: each command on each connection, each request, each connection.",
    "bounds": "Half-open connections, clients that take nothing, and drains end within their published bounds.",
    "comes to rest": "After the last fault all comes to rest.",
    "nothing left": "When all have left, no task, socket, subscription, log entry or channel item is left.",
    "stays up": "Nothing ends the server, and it logs no error that was not provoked.",
    "replay": "The store holds what was committed, and nothing else.",
}


# From the commit to a client that reads, on a machine where nothing is the matter; a drain may be under way.
PROMPT_SECONDS: Final = 0.5


# MAX_CONNECTIONS_PER_PLAYER.
MOST_CONNECTIONS: Final = 4


def rule_of_commit(text: str) -> str:
    """Which rule the model of commits (`tests.support.model`) means."""
    for word, rule in (
        ("presence", "presence"),
        ("effects exist once", "effects"),
        ("current session", "one session"),
        ("begins only after", "one session"),
        ("never begins again", "ended for good"),
        ("ends once", "one session"),
    ):
        if word in text:
            return rule
    return "accepted"


# While a run goes on.


def check_epoch(world: World, life: Life) -> None:
    epoch = life.process.server.hub.epoch
    before = [other for other in world.lives[:-1] if other.process.server.hub.epoch >= epoch]
    same = [other for other in before if other.branch is life.branch]
    if life.number > 1 and same != before:
        world.broken(
            "new epoch",
            "a new life of the store has a new epoch",
            epoch=epoch,
            earlier=[(other.number, other.process.server.hub.epoch) for other in before],
        )
    known = [other.process.server.hub.epoch for other in world.lives if other.branch is life.branch]
    if len(set(known)) > 1:
        world.broken("new epoch", "the same life of the store keeps its epoch", epochs=known)


def check_durable(world: World, former: Branch, present: Branch) -> None:
    """After a power cut with DURABILITY=power."""
    left = set(present.uids.values())
    for branch, uid in world.acceptances:
        if branch is former and uid not in left:
            world.broken("durable", "what was answered 202 survives a power cut", uid=uid)
    for terminal in world.terminals:
        lost = [m for uid, m in terminal.taken.items() if uid in former.uids.values() and uid not in left]
        if lost and terminal.branch is former:
            world.broken("durable", "what was sent survives a power cut", device=terminal.spec.name, lost=lost[0])


def check_refusal(world: World, heard: Heard, code: int) -> None:
    """An event stream says 204 for all that is final: the session has ended, or there are too many connections."""
    ended = _session(heard.branch, heard.player, heard.wanted)
    if code not in (4501, 204) or (ended is not None and ended.end is not None):
        return
    live = heard.life.process.server.hub.sessions.get(heard.player)
    full = live is not None and len(live.connections) + live.arriving >= MOST_CONNECTIONS
    if not (code == 204 and (full or heard.wanted is None)):
        world.broken("answered", "who names a session that has not ended is let in", on=heard.label, code=code)


def check_accepted(world: World, items: list[dict[str, Any]], answers: list[dict[str, Any]], branch: Branch) -> None:
    for item, answer in zip(items, answers, strict=True):
        fact = branch.history.messages.get(answer["seq"])
        if fact is None or fact.id != answer["id"] or branch.stored_at[fact.seq] > trio.current_time():
            world.broken("accepted", "202 means stored", answer=answer, stored=fact)
            continue
        if fact.target != _target(item) or fact.json["content"] != item["message"]["content"]:
            world.broken("accepted", "it is stored as it was said", item=item, stored=fact)
        world.acceptances.append((branch, branch.uids[fact.seq]))


def check_links(world: World, since: dict[str, tuple[int, float]]) -> dict[str, tuple[int, float]]:
    """A client that takes nothing is gone WRITE_TIMEOUT after the chunk. *since*: connection → (bytes, when)."""
    now, found = trio.current_time(), {}
    for id_, connection in world.life.process.server.hub.connections.items():
        link = connection.link
        if not link.unsent or link.closed:
            continue
        sent, began = since.get(id_, (-1, now))
        found[id_] = (link.sent_bytes, began if sent == link.sent_bytes else now)
        if now - found[id_][1] > world.plan.settings["write_timeout"] + 0.6:
            world.broken("bounds", "a client that takes nothing is gone in time", connection=id_)
        if connection.waiting_replies > 66:
            world.broken("bounds", "a connection has so many replies waiting at most", connection=id_)
    return found


def _key(fact: Fact) -> tuple[str, str] | None:
    """Of two messages with the same only the newer one matters to who is behind."""
    key = fact.json.get("replace_key")
    return None if key is None else (fact.target, json.dumps(key))


def _target(item: dict[str, Any]) -> str:
    if "player_id" in item:
        return "@" + str(item["player_id"])
    return "#" + str(item["channel"]) if "channel" in item else "*"


def _session(branch: Branch, player: str, session_id: str | None) -> SessionFacts | None:
    return branch.history.sessions.get((player, session_id or ""))


# At rest.


def judge(world: World) -> None:
    """All that can be said when nothing is under way any more."""
    for heard in world.heard:
        if heard.welcomed:
            _Walk(world, heard).check()
    for terminal in world.terminals:
        _check_terminal(world, terminal)
    _check_seen(world)
    _check_publications(world)
    _check_commands(world)
    _check_data(world)
    _check_timers(world)
    _check_sessions(world)
    _check_log(world)


@define(eq=False)
class _Walk:
    """One connection, walked along from its start, beside the stream that it should have carried."""

    world: World
    heard: Heard
    stream: list[Fact] = field(init=False)
    last: int = 0
    excused: set[int] = field(factory=set)
    stands: dict[int, int] = field(factory=dict)
    """Skipped messages, and the newer one of the same target and key that came in their place."""
    pending: list[Fact] = field(factory=list)
    """Skipped as it seems, but what stands for them has not come on this connection."""

    def __attrs_post_init__(self) -> None:
        facts = _session(self.heard.branch, self.heard.player, self.heard.session_id)
        self.stream = [] if facts is None else self.heard.branch.stream(facts)
        if facts is None:
            self._wrong("one session", "a session is stored before its welcome")

    def _wrong(self, rule: str, text: str, **details: object) -> None:
        self.world.broken(rule, text, on=self.heard.label, **details)

    def check(self) -> None:
        heard, branch = self.heard, self.heard.branch
        self._find_replaced()
        for index, (at, item) in enumerate(heard.items):
            kind = item["type"]
            if kind == "welcome":
                self._check_welcome(index, item)
            elif kind == "gap":
                self._check_gap(index, at, item)
            elif "seq" in item:
                self._check_message(item)
            elif kind in ("heartbeat", "reply") and "position" in item:
                epoch, seq = parse(item["position"])
                if epoch != heard.epoch:
                    self._wrong("gap", "positions have the connection's epoch", item=item)
                self._pass_to(seq, item)
        for fact in self.pending:
            if not any(f.seq > self.last and _key(f) == _key(fact) for f in self.stream):
                self._wrong("nothing lost", "a newer message of its key comes later", skipped=fact, last=self.last)
        if heard.plain and not self.world.disk_was_ill:
            self._check_promptness()
        if heard.open and heard.reachable and branch is self.world.life.branch:
            self._pass_to(branch.history.newest, "the end")
            self._check_replies()

    def _check_welcome(self, index: int, welcome: dict[str, Any]) -> None:
        heard = self.heard
        if index:
            self._wrong("own stream", "one welcome, first")
        if heard.named is not None and welcome["position"] != heard.named:
            self._wrong("gap", "the welcome has the named position", welcome=welcome, named=heard.named)
        if heard.wanted not in (None, heard.session_id):
            self._wrong("one session", "the wanted session, or none", wanted=heard.wanted)
        facts = _session(heard.branch, heard.player, heard.session_id)
        if facts is not None and facts.end is not None and heard.branch.stored_at[facts.end] < heard.opened_at:
            self._wrong("ended for good", "an id that has ended is not welcomed", session=heard.session_id)
        following = heard.items[1][1] if len(heard.items) > 1 else {}
        told = following.get("type") == "gap" and following["reason"]
        # What retention takes later, while the client is behind, is a gap too: then it may be the next that it hears.
        gone = [at for seq, at in heard.branch.gone_at.items() if seq > parse(welcome["position"])[1]]
        late = told == "retention" and not any(at < heard.opened_at for at in gone)
        if told and welcome["resumed"] and not late:
            self._wrong("gap", "a gap means: not resumed", gap=following)
        if heard.named is not None and len(heard.items) > 1:
            older = heard.named_in is not heard.branch
            if older and told not in ("epoch", "future"):
                self._wrong("gap", "who comes from an earlier life of the store is told so", named=heard.named)
            if told == "epoch" and not older:
                self._wrong("gap", "nothing says that the store has a new life", gap=following)
        self.last = parse(welcome["position"])[1]

    def _check_message(self, item: dict[str, Any]) -> None:
        seq = item["seq"]
        if seq <= self.last:
            self._wrong("own stream", "numbers strictly increase", last=self.last, message=item)
        fact = next((fact for fact in self.stream if fact.seq == seq), None)
        if fact is None:
            self._wrong("own stream", "only the session's own stream comes", message=item)
            return
        told = {"seq"} | ({"replaces"} if _key(fact) is not None else set())
        if {name: value for name, value in item.items() if name not in told} != fact.json:
            self._wrong("stored first", "a message is what was stored", message=item, stored=fact)
        self._pass_to(seq - 1, item)
        self.last = seq

    def _find_replaced(self) -> None:
        """Which messages were skipped for which (docs/protocol.rst, "Replaced messages")."""
        keyed = [(fact.seq, key) for fact in self.stream if (key := _key(fact)) is not None]
        keys = dict(keyed)
        newest: dict[tuple[str, str], int] = {}
        for _, item in self.heard.items:
            key = keys.get(item.get("seq", 0))
            if key is None:
                continue
            after = newest.get(key, self.heard.start)
            newest[key] = seq = item["seq"]
            count = item.get("replaces", 0)
            between = [other for other, its in keyed if its == key and after < other < seq]
            lost = [other for other in between if other in self.heard.branch.gone_at]
            if count > len(between) or count < len(between) - len(lost):
                self._wrong("nothing lost", "`replaces` counts what was skipped", message=item, skipped=between)
            self.stands |= dict.fromkeys(between, seq)

    def _check_gap(self, index: int, at: float, gap: dict[str, Any]) -> None:
        heard = self.heard
        (named_epoch, after), (epoch, position) = parse(gap["after"]), parse(gap["position"])
        if epoch != heard.epoch:
            self._wrong("gap", "positions have the connection's epoch", item=gap)
        if gap["reason"] == "retention":
            gone = heard.branch.gone_at
            lost = {f.seq for f in self.stream if f.seq > after and gone.get(f.seq, at + 1) <= at}
            if not lost:
                self._wrong("gap", "a gap is told only where something is missing", gap=gap)
            if not position >= after >= self.last:
                self._wrong("gap", "a gap leads on", gap=gap, last=self.last)
            self.excused |= lost
            self._pass_to(position, gap)
            return
        if index != 1:
            self._wrong("gap", "a gap of epoch or future stands right after the welcome", gap=gap)
        if gap["reason"] == "epoch":
            self._check_epoch_gap(gap, after, position)
        elif (named_epoch, after) <= (epoch, heard.branch.history.newest) and heard.named_in is heard.branch:
            self._wrong("gap", "nobody names a future that has been given out", gap=gap)
        self.last = position

    def _check_epoch_gap(self, gap: dict[str, Any], after: int, position: int) -> None:
        former, present = self.heard.named_in, self.heard.branch
        shared = gap["shared"]
        if position != min(after, shared):
            self._wrong("gap", "the stream goes on after the smaller of the two", gap=gap)
        if former is None:
            return
        apart = [seq for seq, uid in present.uids.items() if seq <= shared and former.uids.get(seq, uid) != uid]
        if apart:
            self._wrong("gap", "the two lives agree up to `shared`", gap=gap, apart=apart)

    def _pass_to(self, seq: int, by: object) -> None:
        """Everything up to *seq* has come, or is told to be lost, or in its place comes a newer message."""
        passed = [f for f in self.stream if self.last < f.seq <= seq and f.seq not in self.excused]
        in_stream = isinstance(by, dict) and "seq" in by
        if in_stream:
            self.pending += [f for f in passed if f.seq not in self.stands and _key(f) is not None]
            lost = [f for f in passed if f.seq not in self.stands and _key(f) is None]
        else:
            # Nothing that has a position comes between a skipped message and the one that stands for it.
            lost = self.pending + [f for f in passed if self.stands.get(f.seq, seq + 1) > self.last]
        if lost:
            self._wrong(
                "nothing lost",
                "all of the stream has come, or a gap was told",
                named=self.heard.named,
                last=self.last,
                by=by,
                missing=[(f.seq, f.target, f.json["type"]) for f in lost],
                removed=[f.seq for f in lost if f.seq in self.heard.branch.gone_at],
            )
        self.last = max(self.last, seq)

    def _check_promptness(self) -> None:
        """Nothing is the matter with this connection: it gets what is new at once, and is not taken for dead."""
        heard = self.heard
        if heard.code in (4008, 4012):
            self._wrong("bounds", "who reads and answers is not ended for it", code=heard.code)
        since = heard.items[0][0]
        for at, item in heard.items:
            stored_at = heard.branch.stored_at.get(item.get("seq", 0), at)
            if stored_at > since and at - stored_at > PROMPT_SECONDS:
                self._wrong("bounds", "who reads gets what is new at once", stored_at=stored_at, at=at, message=item)

    def _check_replies(self) -> None:
        """Each command that was said on a connection that lives has its reply there."""
        replies = Counter(item["id"] for _, item in self.heard.items if item["type"] == "reply")
        for id_, times in self.heard.asked.items():
            if replies[id_] != times:
                self._wrong("answered", "replies are never dropped", command=id_, asked=times, replies=replies[id_])


def _check_terminal(world: World, terminal: Terminal) -> None:
    """A device that keeps its position has all of its session's stream."""
    if not terminal.spec.names or not terminal.stays:
        return
    stay: Stay = terminal.stays[-1]
    branch = world.life.branch
    facts = _session(branch, terminal.spec.player, stay.session)
    if facts is None or stay.first.branch is not branch:
        world.broken("all of it", "a device knows in which life of the store it is", device=terminal.spec.name)
        return
    excused: set[int] = set()
    for heard in world.heard:
        if heard.terminal is terminal and heard.branch is branch and heard.welcomed:
            walk = _Walk(world, heard)
            walk.check()
            excused |= walk.excused
    missing = [
        fact
        for fact in branch.stream(facts)
        if fact.seq > stay.first.start and branch.uids[fact.seq] not in terminal.taken and fact.seq not in excused
    ]
    newest = {_key(f): f.seq for f in branch.stream(facts) if branch.uids[f.seq] in terminal.taken}
    missing = [f for f in missing if _key(f) is None or newest.get(_key(f), 0) < f.seq]
    if missing:
        world.broken(
            "all of it",
            "a device has all of its session's stream",
            device=terminal.spec.name,
            since=stay.first.label,
            start=stay.first.start,
            number=terminal.number,
            missing=[(f.seq, f.target, f.json["type"]) for f in missing],
        )


_ARRIVED: Final = re.compile(rb'\{"seq":(\d+),(?:"replaces":\d+,)?"id":"([^"]+)"')


def _check_seen(world: World) -> None:
    """Where a connection starts that names nothing, and where a new session's mail starts."""
    got: dict[tuple[str, int], set[int]] = {}
    told: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for heard in world.heard:
        key = heard.player, heard.branch.number
        numbers = got.setdefault(key, set())
        numbers |= {int(seq) for seq, _ in _ARRIVED.findall(bytes(heard.record))}
        for _, item in heard.items:
            if item["type"] == "gap" and item["reason"] == "retention":
                told.setdefault(key, []).append((parse(item["after"])[1], parse(item["position"])[1]))
        if heard.named is not None and heard.named_in is not None:
            where = heard.player, heard.named_in.number
            world.claims[where] = max(world.claims.get(where, 0), parse(heard.named)[1])
    for heard in world.heard:
        facts = _session(heard.branch, heard.player, heard.session_id) if heard.welcomed else None
        if heard.named is None and facts is not None:
            _check_mark(world, heard.branch, facts, heard.start, got, told, heard.label)
            _check_acknowledged(world, heard)
    for facts in world.life.branch.history.sessions.values():
        former = _former(world.life.branch, facts)
        if former is not None:
            _check_mark(world, world.life.branch, former, facts.mail_from, got, told, f"mail of {facts.id}", "@")


def _former(branch: Branch, facts: SessionFacts) -> SessionFacts | None:
    earlier = [s for s in branch.history.sessions.values() if s.player == facts.player and s.start < facts.start]
    return max(earlier, key=lambda s: s.start, default=None)


def _check_mark(
    world: World,
    branch: Branch,
    facts: SessionFacts,
    mark: int,
    got: dict[tuple[str, int], set[int]],
    told: dict[tuple[str, int], list[tuple[int, int]]],
    where: str,
    targets: str = "",
) -> None:
    arrived: set[int] = set()
    claimed = 0
    gaps: list[tuple[int, int]] = []
    for number in range(1, branch.number + 1):
        # What an earlier branch has delivered counts if this one has it too.
        other = world.truth.branches[number - 1]
        key = facts.player, number
        arrived |= {seq for seq in got.get(key, ()) if other.uids.get(seq) == branch.uids.get(seq)}
        claimed = max(claimed, world.claims.get(key, 0))
        gaps += told.get(key, [])
    stream = branch.stream(facts)
    for fact in stream:
        if fact.seq > mark or fact.seq in arrived or fact.seq <= claimed or not fact.target.startswith(targets):
            continue
        if fact.seq in branch.gone_at and any(after < fact.seq for after, _ in gaps):
            continue
        if _key(fact) is not None and any(
            _key(f) == _key(fact) and f.seq in arrived for f in stream if f.seq > fact.seq
        ):
            continue
        world.broken("seen", "what counts as seen has arrived", at=where, mark=mark, claimed=claimed, missing=fact.seq)


def _check_acknowledged(world: World, heard: Heard) -> None:
    life, session, number = heard.terminal.acked
    later = heard.life is life and heard.session_id == session and heard.opened_at > heard.terminal.acked_at
    if later and heard.start < number:
        world.broken("seen", "what was acknowledged counts", on=heard.label, start=heard.start, acked=number)


def _check_publications(world: World) -> None:
    branch = world.life.branch
    for publication in world.publishers.publications:
        if not publication.named:
            continue
        ids = [item["message"]["id"] for item in publication.items]
        first: dict[int, list[int]] = {}
        for where, status, said in publication.said:
            if status != 202:
                continue
            numbers = [answer["seq"] for answer in (said if isinstance(said, list) else [said])]
            uids = [where.uids.get(number, 0) for number in numbers]
            known = first.get(where.number, uids)
            first[where.number] = uids
            gone = {where.uids[seq] for seq in where.gone_at}
            if any(old != new and old not in gone for old, new in zip(known, uids, strict=True)):
                world.broken("accepted", "the same id has one number", ids=ids, first=known, then=uids)
        messages = branch.history.messages.values()
        # Of two requests with the same ids that were under way together the other one may have come first.
        stored = [fact.id for fact in messages if fact.id in set(ids) and fact.json.get("content") != OTHER]
        last = publication.said[-1] if publication.said else None
        lately = last is not None and last[0] is branch
        if lately and last is not None and last[1] == 202 and len(stored) < len(set(ids)):
            world.broken("accepted", "what was answered 202 is stored", ids=ids, stored=stored)
        refused = not publication.unheard and all(status != 202 for _, status, _ in publication.said)
        if refused and stored and publication.said:
            world.broken("accepted", "what was refused is not stored", ids=ids, said=publication.said)
    counted = Counter(f.id for f in branch.history.messages.values() if f.seq not in branch.history.removed)
    double = [id_ for id_, times in counted.items() if times > 1]
    if double:
        world.broken("accepted", "an id is that of one message", ids=double)


def _check_commands(world: World) -> None:
    for asked in world.commands:
        if asked.kind == "command":
            _check_command(world, asked)


def _check_command(world: World, asked: Asked) -> None:
    branch = world.life.branch
    key = asked.player, asked.session, asked.id
    run = branch.history.runs.get(key)
    what = asked.content["do"]
    barren = what in ("look", "hang", "raise", "refuse")
    if barren and run is not None:
        world.broken("effects", "a handler that fails has done nothing", command=key, run=run)
    for where, reply in asked.replies:
        if reply["ok"] and not barren:
            stored = where.history.runs.get(key)
            if reply["content"]["run"] != stored:
                world.broken("effects", "an answer is that of the run that is stored", reply=reply, stored=stored)
        elif not reply["ok"] and "another command" in reply["error"]["message"] and not asked.others:
            world.broken("effects", "a conflict needs two commands", reply=reply)
    unknown = asked.unheard or any(
        r["ok"] or r["error"]["error_type"] == "session_error" or where is not branch for where, r in asked.replies
    )
    if run is not None and asked.replies and not unknown:
        world.broken("effects", "what was answered with an error has not happened", command=key, replies=asked.replies)


def _check_data(world: World) -> None:
    branch, hub = world.life.branch, world.life.process.server.hub
    stored = {
        key: json.loads(value) for key, value in rows(world.path, "SELECT key, value FROM data WHERE value <> ''")
    }
    total = 0
    contents = {(a.player, a.session, a.id): a for a in world.commands}
    for player in {device.player: None for device in world.plan.devices}:
        done = [
            [fact.json["content"]["session"], fact.json["content"]["command"]]
            for fact in branch.history.messages.values()
            if fact.target == "@" + player and fact.json["type"] == "did"
        ]
        acts = [pair for pair in done if contents[player, *pair].content["do"] in ("act", "slow")]
        data = stored.get(player_key(player), {})
        if data.get("acts", []) != acts:
            world.broken("data", "a player's data is what was done", player=player, data=data, acts=acts)
        if "fight" in data:
            world.broken("timers", "a fight comes to its end", player=player, data=data)
        for pair in acts:
            asked = contents[player, *pair]
            total += asked.content["n"]
    if stored.get("sum", 0) != total and not any(asked.others for asked in world.commands):
        world.broken("data", "the world's data is what was done", sum=stored.get("sum", 0), done=total)
    held = set(hub.data.committed_keys())
    if held != stored.keys():
        world.broken("data", "memory and store hold the same", memory=sorted(held), stored=sorted(stored))


def _check_timers(world: World) -> None:
    """Blows and days are numbered by data, so each is there once if the numbers are without a hole."""
    history = world.life.branch.history
    fights: dict[str, list[int]] = {}
    ends: dict[str, int] = {}
    days = []
    for fact in history.messages.values():
        content = fact.json["content"]
        if fact.json["type"] == "blow":
            fights.setdefault(content["name"], []).append(content["blow"])
            ends[content["name"]] = content["of"]
        elif fact.json["type"] == "day":
            days.append(content)
    for name, blows in fights.items():
        if blows != list(range(1, ends[name] + 1)):
            world.broken("timers", "each blow is struck once, in its turn", fight=name, blows=blows)
    if days and days != list(range(1, DAYS + 1)):
        world.broken("timers", "each day comes once, in its turn", days=days)


def _check_sessions(world: World) -> None:
    branch, hub = world.life.branch, world.life.process.server.hub
    history = branch.history
    for player in {device.player: None for device in world.plan.devices}:
        current, live = history.current(player), hub.sessions.get(player)
        if live is None or current is None or live.session_id != current.id:
            world.broken("one session", "the live session is the current one", player=player, live=live)
            continue
        channels = {interval.channel for interval in current.intervals if interval.end is None}
        if set(live.channels) != channels:
            world.broken("one session", "subscriptions are as stored", live=live.channels, stored=channels)
        told = current.told[-1] if current.told else ""
        if told not in ("join", "return"):
            world.broken("presence", "the game knows who is there", player=player, told=current.told)
    for channel, listeners in hub.channels.items():
        if any(hub.sessions.get(session.player_id) is not session for session in listeners):
            world.broken("one session", "only live sessions listen", channel=channel)
    held = {seq for (seq,) in rows(world.path, "SELECT seq FROM messages")}
    if held != history.messages.keys() - history.removed:
        world.broken("replay", "what was committed is stored", odd=held ^ (history.messages.keys() - history.removed))
    stored = set(rows(world.path, "SELECT player_id, session_id FROM sessions WHERE ended_at IS NULL"))
    if stored != {(s.player, s.id) for s in history.sessions.values() if s.end is None}:
        world.broken("replay", "the current sessions are stored", stored=sorted(stored))


# Provoked: by a handler that raises or hangs, a disk that fails, a drain that had no time.
_PROVOKED: Final = ("Unexpected error in on_command",)


def _check_log(world: World) -> None:
    for line in world.lines:
        if line["event"].startswith("Leak of"):
            world.broken("nothing left", "the server finds no leak in itself", line=line)
        if line["level"] not in ("ERROR", "CRITICAL") or line["event"].startswith(_PROVOKED):
            continue
        if world.disk_was_ill and line.get("error_type") in ("persistence_error", "session_error"):
            continue
        if world.disk_was_ill and "Unexpected error in on_" in line["event"]:
            continue
        world.broken("stays up", "no error is logged", line=line)
        return


# When all have left, and after the end.


async def judge_leftovers(world: World) -> None:
    server = world.life.process.server
    hub, front, streams, registrar = server.hub, server.front, server.streams, server.registrar
    assert front is not None  # it runs
    left: dict[str, object] = {
        "sessions": dict(hub.sessions),
        "connections": dict(hub.connections),
        "channels": dict(hub.channels),
        "connections that are behind": dict(hub.apart),
        "sessions that are stuck": list(hub.stuck),
        "clocks": [owner for owner in hub.clocks if owner != "world"],
        "transactions": server.dispatcher.queued,
        "handlers": dict(server.context.handlers),
        "turns": dict(server.context.turns._locks),
        "handshakes": front.handshakes,
        "requests": front._answering,
        "connections that arrive": streams._arriving,
        "changes of players": dict(registrar._changes),
        "on_leave": dict(registrar._leaving),
        "failed writes": server._failures.statistics().current_buffer_used,
        "batches": server.dispatcher._to_deliver.statistics().current_buffer_used,
        "sockets": world.life.process.listener.open_wires,
        "leaks": [f"{leak.kind} {leak.name}: {leak.why}" for leak in await server.ledger.look()],
    }
    for what, found in left.items():
        if found:
            world.broken("nothing left", f"when all have left: {what}", found=found)
    odd = [name for name in task_names() if not _is_servers_own(name)]
    if odd:
        world.broken("nothing left", "when all have left: tasks", found=odd)
    for facts in world.life.branch.history.sessions.values():
        if facts.told and facts.told[-1] != "leave":
            world.broken("presence", "who joined has left", session=facts.id, told=facts.told)
    owed = rows(world.path, "SELECT player_id, owed FROM sessions WHERE owed <> ''")
    if owed:
        world.broken("presence", "nothing is owed", owed=owed)


_SERVERS_OWN: Final = re.compile(
    r"writer|dispatcher|poller|registrar|streams|monitor|the world's timers|grace times|newcomers|bridge|front door"
    r"|background of the game|deadlines of handlers"
    r"|health checker: .*|inspector|<init>|.*_main|.*_serve|.*Registrar.run|.*Streams.run|.*Bridge.run|.*Listener.*"
    r"|trio\..*|.*run_sync_soon.*|.*EntryQueue.*|app|lifespan.*|.*handle_lifespan.*|.*hypercorn.*|.*World\._.*"
)


def _is_servers_own(name: str) -> bool:
    return _SERVERS_OWN.fullmatch(name) is not None


def judge_end(world: World) -> None:
    odd = [n for n in task_names() if _is_servers_own(n) and n in ("writer", "dispatcher", "registrar", "streams")]
    if odd:
        world.broken("nothing left", "after the drain no task is left", found=odd)
    left = rows(world.path, "SELECT * FROM connections")
    if left:
        world.broken("nothing left", "after the drain no row of a connection is left", found=left)


def task_names() -> list[str]:
    """Of all tasks of this run."""
    names, todo = [], [trio.lowlevel.current_root_task()]
    while todo:
        task = todo.pop()
        if task is not None:
            names.append(task.name)
            todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return names


__all__ = ["RULES", "judge", "judge_end", "judge_leftovers"]
