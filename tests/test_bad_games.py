"""Games with mistakes: each costs its own player at most, says what to do, and harms nothing that is stored."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import pytest
import trio
from trio.testing import MockClock

from mythos_trio import logs
from mythos_trio.game import Command, CommandError, Game, GameError, Player
from mythos_trio.game import World as GameWorld
from mythos_trio.testing import Client, World, play

Mistake = Callable[[Player], Awaitable[Any]]


class Bad(Game):
    """The command ``bad`` says something and then makes the *mistake*; all other commands count."""

    def __init__(self, mistake: Mistake) -> None:
        self.mistake = mistake
        self.runs = 0

    async def on_command(self, player: Player, command: Command) -> Any:
        if command.text == "bad":
            self.runs += 1
            player.send("line", "this must not come")
            player.data["bad"] = True
            player.world.data["gold"] = 0
            player.after(1, "bad")
            return await self.mistake(player)
        gold: int = player.world.data.get("gold", 7) + 1
        player.world.data["gold"] = gold
        return gold


async def make(mistake: Mistake) -> tuple[str, str]:
    """Alice's command makes the *mistake*: what she is told, and what the author finds in the log.

    Nothing has happened then, also not after a crash; bob, who plays on meanwhile, does not notice.
    """
    game = Bad(mistake)
    async with play(game, allow_errors=True) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        assert (await bob.command("count")).content == 8
        saying = await alice.say("bad")
        assert (await bob.command("count")).content == 9
        reply = await saying.reply()
        assert not reply.ok
        await _nothing_has_happened(world, alice, 9)
        assert (await alice.command("count")).content == 10
        await world.crash()
        await _nothing_has_happened(world, alice, 10)
        assert (await bob.command("count")).content == 11
        await world.sleep(10)
        assert alice.scroll == []
        assert game.runs <= 1 + 5
    assert reply.error is not None
    return reply.error, "\n".join(world.errors)


async def _nothing_has_happened(world: World, alice: Client, gold: int) -> None:
    assert world.data["gold"] == gold
    assert world.data_of("alice") == {}
    assert alice.scroll == []
    assert world._process.server.hub.timers == {}


# What a handler may do wrong: (the mistake, what the log says).


async def raise_something(player: Player) -> None:
    raise ZeroDivisionError("on purpose")


async def exit_the_process(player: Player) -> None:
    sys.exit("bye")


async def interrupt(player: Player) -> None:
    raise KeyboardInterrupt


async def exit_in_a_nursery(player: Player) -> None:
    async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - the nursery is the point
        nursery.start_soon(exit_the_process, player)


async def gather_a_million(player: Player) -> None:
    for number in range(1_000_000):
        player.send("line", number)


async def set_a_million_timers(player: Player) -> None:
    for number in range(1_000_000):
        player.after(1, f"t{number}")


async def write_a_million_values(player: Player) -> None:
    for number in range(1_000_000):
        player.world.data[f"k{number}"] = number


async def send_a_megabyte(player: Player) -> None:
    player.send("line", "x" * (1 << 20))


async def send_many_kilobytes(player: Player) -> None:
    for _ in range(100):
        player.send("line", "x" * 60_000)


async def write_a_megabyte(player: Player) -> None:
    player.world.data["book"] = "x" * (1 << 20)


async def fill_the_player(player: Player) -> None:
    for number in range(100):
        player.data[f"page{number}"] = "x" * 1000


async def answer_a_megabyte(player: Player) -> str:
    return "x" * (1 << 20)


async def write_no_json(player: Player) -> None:
    player.world.data["thing"] = object()


async def write_a_circle(player: Player) -> None:
    circle: list[Any] = []
    circle.append(circle)
    player.data["circle"] = circle


async def send_no_json(player: Player) -> None:
    player.send("line", {1j: "?"})


async def answer_no_json(player: Player) -> object:
    return {"set of things": {object()}}


async def write_none(player: Player) -> None:
    player.world.data["thing"] = None


async def write_a_bad_key(player: Player) -> None:
    player.world.data["two words"] = 1


async def write_a_key_that_is_no_text(player: Player) -> None:
    player.world.data[7] = 1  # type: ignore[index]


async def write_a_long_key(player: Player) -> None:
    player.world.data["k" * 129] = 1


async def read_a_bad_key(player: Player) -> None:
    player.world.data.get("")


async def write_over_a_player(player: Player) -> None:
    player.world.data["player/bob"] = 5


async def name_a_player_badly(player: Player) -> None:
    player.world.data_of("no one")["x"] = 1


async def wait_a_negative_time(player: Player) -> None:
    player.after(-1, "never")


async def wait_for_nan(player: Player) -> None:
    player.after(float("nan"), "never")


async def run_within(player: Player) -> None:
    await Bad(run_within).run(_say_rain)


async def publish_nowhere(player: Player) -> None:
    player.world.publish("a channel", "line", 1)


async def set_a_field_of_the_server(player: Player) -> None:
    player.send("line", 1, seq=7)


async def leave_a_scope_open(player: Player) -> None:
    trio.move_on_after(60).__enter__()  # noqa: ASYNC122 - a mistake
    await trio.lowlevel.checkpoint()


async def leave_a_scope_open_at_once(player: Player) -> None:
    trio.move_on_after(60).__enter__()  # noqa: ASYNC122 - a mistake


async def leave_a_shield_open(player: Player) -> None:
    trio.CancelScope(shield=True).__enter__()


async def leave_a_nursery_open(player: Player) -> None:
    await trio.open_nursery().__aenter__()


async def await_nothing(player: Player) -> None:
    await 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (raise_something, "ZeroDivisionError: on purpose"),
        (exit_the_process, "on_command raised SystemExit('bye'): a game cannot end the server"),
        (interrupt, "on_command raised KeyboardInterrupt(): a game cannot end the server"),
        (exit_in_a_nursery, "a game cannot end the server"),
        (gather_a_million, "one handler may send, publish and subscribe 1,000 times in all"),
        (set_a_million_timers, "1,000 times in all"),
        (write_a_million_values, "1,000 times in all"),
        (send_a_megabyte, "send: 1,048,"),
        (send_many_kilobytes, "one handler's messages and data may have 1,048,576 bytes in all"),
        (write_a_megabyte, "data['book']: 1,048,578 bytes; there is room for 65,536"),
        (fill_the_player, "there is room for 16,384"),
        (answer_a_megabyte, "on_command returned: 1,048,"),
        (write_no_json, "data['thing']: the content cannot be written as JSON"),
        (write_a_circle, "the content contains itself, or is nested too deeply"),
        (send_no_json, "send: the content cannot be written as JSON"),
        (answer_no_json, "on_command returned: the content cannot be written as JSON"),
        (write_none, "None means that there is nothing; use `del data['thing']`"),
        (write_a_bad_key, "a key has 1-128 of A-Z a-z 0-9 _ . : / -; not 'two words'"),
        (write_a_key_that_is_no_text, "a key has 1-128 of A-Z a-z 0-9 _ . : / -; not 7"),
        (write_a_long_key, "a key has 1-128 of"),
        (read_a_bad_key, "a key has 1-128 of A-Z a-z 0-9 _ . : / -; not ''"),
        (write_over_a_player, "a player's data are names and values: a dict, not 5"),
        (name_a_player_badly, "data_of: "),
        (wait_a_negative_time, "after: seconds are a number from 0 to 31,622,400, not -1"),
        (wait_for_nan, "after: seconds are a number from 0 to 31,622,400, not nan"),
        (publish_nowhere, "publish: "),
        (set_a_field_of_the_server, "send: the server sets seq; name the field otherwise"),
        (leave_a_scope_open, "Cancel scope stack corrupted"),
        (leave_a_scope_open_at_once, "Cancel scope stack corrupted"),
        (leave_a_shield_open, "Cancel scope stack corrupted"),
        (leave_a_nursery_open, "Cancel scope stack corrupted"),
        (await_nothing, "TypeError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_mistake_costs_its_own_player(mistake: Mistake, said: str, autojump_clock: MockClock) -> None:
    told, logged = await make(mistake)
    assert told == "the game made a mistake; nothing has happened"
    assert logged.startswith("Unexpected error in on_command handler=on_command player_id=alice\n")
    assert said in logged


async def test_a_scope_without_a_deadline_that_is_left_open_harms_nobody(autojump_clock: MockClock) -> None:
    class Careless(Game):
        async def on_command(self, player: Player, command: Command) -> Any:
            trio.CancelScope().__enter__()
            if command.text == "slow":
                await trio.sleep_forever()

    async with play(Careless(), allow_errors=True) as world:
        alice = await world.connect("alice")
        for _ in range(3):
            assert (await alice.command("quick")).ok
        assert not (await alice.command("slow")).ok
        assert (await alice.command("quick")).ok
        await world.restart()
    assert [error.partition(" handler=")[0] for error in world.errors] == ["Unexpected error in on_command"]


async def test_a_handler_that_never_returns(autojump_clock: MockClock) -> None:
    async def wait_for_ever(player: Player) -> None:
        await trio.sleep_forever()

    told, logged = await make(wait_for_ever)
    assert told == "the game took longer than 10 seconds; nothing has happened"
    assert (
        logged
        == "Unexpected error in on_command: it took longer than HANDLER_TIMEOUT handler=on_command player_id=alice"
    )


async def test_a_handler_that_will_not_be_cancelled(autojump_clock: MockClock) -> None:
    """It is cut off at each of its waits, until it gives in."""
    cuts: list[int] = []

    async def hold_on(player: Player) -> None:
        for number in range(10):
            try:
                await trio.sleep_forever()
            except trio.Cancelled:  # noqa: ASYNC103 - so does a bad game
                cuts.append(number)
        await trio.sleep_forever()

    told, _ = await make(hold_on)
    assert told == "the game took longer than 10 seconds; nothing has happened"
    assert cuts == list(range(10))


async def test_data_that_others_keep_changing(autojump_clock: MockClock) -> None:
    """Six runs, then "busy": a handler that reads what all write, and waits, cannot hold up the others."""

    class Slow(Game):
        async def on_command(self, player: Player, command: Command) -> Any:
            gold = player.world.data.get("gold", 0)
            await trio.sleep(4 if command.text == "slow" else 0)
            player.world.data["gold"] = gold + 1
            return gold + 1

    async with play(Slow) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        saying = await alice.say("slow")
        for _ in range(30):
            assert (await bob.command("quick")).ok
            await world.sleep(1)
        reply = await saying.reply()
        assert (reply.ok, reply.error_type) == (False, "capacity_error")
        assert reply.error is not None
        assert reply.error.startswith("busy")
        assert world.data["gold"] == 30


# What is kept and used later.


class Keeper(Game):
    """Keeps what handlers are handed, in a task of its own that outlives them."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.later = trio.Event()
        self.nursery: trio.Nursery | None = None

    async def background(self) -> None:
        async with trio.open_nursery() as self.nursery:
            await trio.sleep_forever()

    async def on_command(self, player: Player, command: Command) -> str:
        assert self.nursery is not None
        self.nursery.start_soon(self._use, player)
        return "ok"

    async def _use(self, player: Player) -> None:
        await self.later.wait()
        world = player.world
        for use in (
            lambda: player.send("line", 1),
            lambda: world.publish("c", "line", 1),
            lambda: player.subscribe("c"),
            lambda: player.data["x"],
            lambda: player.data.__setitem__("x", 1),
            lambda: world.data.get("x"),
            lambda: world.data.pop("x"),
            lambda: player.after(1, "t"),
            lambda: world.cancel("t"),
            lambda: player.channels,
            lambda: world.present(),
            lambda: player.new_session(),
            lambda: player.disconnect("no"),
        ):
            with pytest.raises(GameError, match="has ended, and its transaction with it") as failure:
                use()
            self.errors.append(str(failure.value))
        await self.run(_say_rain)


async def _say_rain(world: GameWorld) -> None:
    world.broadcast("weather", "rain")


async def test_a_task_that_outlives_its_handler(autojump_clock: MockClock) -> None:
    game = Keeper()
    async with play(game) as world:
        alice = await world.connect("alice")
        assert (await alice.command("keep")).ok
        game.later.set()
        await world.settle()
        assert len(game.errors) == 13
        assert all("await game.run(function)" in error for error in game.errors)
        assert alice.lines == ["rain"]
        assert dict(world.data) == {}


async def test_game_run_in_a_handler_is_refused(autojump_clock: MockClock) -> None:
    class Mixed(Game):
        async def on_command(self, player: Player, command: Command) -> None:
            await self.run(_say_rain)

    async with play(Mixed, allow_errors=True) as world:
        alice = await world.connect("alice")
        assert not (await alice.command("rain")).ok
        assert alice.lines == []
        assert "game.run() in a handler" in world.errors[0]
        await world.run(_say_rain)
        assert alice.lines == ["rain"]


async def test_a_read_value_that_is_changed_in_place_changes_nothing(autojump_clock: MockClock) -> None:
    class Careless(Game):
        async def on_command(self, player: Player, command: Command) -> Any:
            if command.text == "put":
                player.world.data["chest"] = {"gold": 3}
            player.world.data["chest"]["gold"] = 99
            return player.world.data["chest"]

    async with play(Careless) as world:
        alice = await world.connect("alice")
        for text in ("put", "look"):
            assert (await alice.command(text)).content == {"gold": 3}


# Blocking.


async def test_a_handler_that_blocks_is_named(autojump_clock: MockClock) -> None:
    class Blocking(Game):
        async def on_command(self, player: Player, command: Command) -> str:
            await trio.sleep(5)
            if command.text == "block":
                time.sleep(0.15)  # noqa: ASYNC251
            return "done"

    with logs.capture() as lines:
        async with play(Blocking, handler_timeout=30) as world:
            alice, bob = await world.connect("alice"), await world.connect("bob")
            assert (await bob.command("wait")).content == "done"
            assert (await alice.command("block")).content == "done"
    (line,) = [line for line in lines if line["event"].startswith("The game blocked the server: on_command ran for 0.")]
    assert (line["level"], line["player_id"], line["handler"]) == ("WARNING", "alice", "on_command")
    assert line["seconds"] >= 0.15
    assert "trio.to_thread.run_sync" in line["fix"]


async def test_a_timer_that_blocks_is_named_with_its_player(autojump_clock: MockClock) -> None:
    class Blocking(Game):
        async def on_command(self, player: Player, command: Command) -> str:
            player.after(1, "late", None)
            return "done"

        async def on_timer(self, player: Player, name: str, value: object) -> None:
            time.sleep(0.15)  # noqa: ASYNC251
            player.send("line", name)

    with logs.capture() as lines:
        async with play(Blocking) as world:
            bob = await world.connect("bob")
            await bob.command("wait")
            await bob.until("line")
    (line,) = [line for line in lines if line["event"].startswith("The game blocked the server: on_timer ran for 0.")]
    assert line["player_id"] == "bob"


# The other handlers.


class Everywhere(Game):
    """All handlers but on_command raise, after having said something."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def _fail(self, name: str, world: GameWorld) -> NoReturn:
        self.ran.append(name)
        world.broadcast("line", "this must not come")
        world.data["bad"] = name
        raise RuntimeError(f"{name} on purpose")

    async def on_join(self, player: Player) -> None:
        self._fail("on_join", player.world)

    async def on_linkdead(self, player: Player) -> None:
        self._fail("on_linkdead", player.world)

    async def on_return(self, player: Player) -> None:
        self._fail("on_return", player.world)

    async def on_leave(self, player: Player, reason: str) -> None:
        self._fail("on_leave", player.world)

    async def on_timer(self, player: Player, name: str, value: Any) -> None:
        self._fail("on_timer", player.world)

    async def on_world_timer(self, world: GameWorld, name: str, value: Any) -> None:
        self._fail("on_world_timer", world)

    async def on_command(self, player: Player, command: Command) -> str:
        player.after(5, "t")
        player.world.after(5, "t")
        return "set"


async def test_handlers_of_presence_and_timers_that_raise_are_run_once(autojump_clock: MockClock) -> None:
    game = Everywhere()
    async with play(game, allow_errors=True, linkdead_grace=20) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        assert (await alice.command("set")).ok
        await world.sleep(60)
        await alice.leave()
        await world.sleep(5)
        await alice.reconnect()
        await alice.leave()
        await world.sleep(60)
        assert world.presence("alice") == "offline"
        await world.crash()
        assert sorted(game.ran) == sorted(
            ["on_join", "on_join", "on_timer", "on_world_timer", "on_linkdead", "on_return", "on_linkdead", "on_leave"]
        )
        assert dict(world.data) == {}
        assert alice.lines == bob.lines == []
        assert (await bob.command("set")).ok
    assert len(world.errors) == 8


# The game's own task.


async def test_a_background_that_raises_begins_again_after_a_pause(autojump_clock: MockClock) -> None:
    class Unsteady(Game):
        def __init__(self) -> None:
            self.began: list[float] = []

        async def background(self) -> None:
            self.began.append(round(trio.current_time()))
            if len(self.began) < 9:
                raise RuntimeError("the weather broke")
            await self.run(_say_rain)

    game = Unsteady()
    async with play(game, allow_errors=True) as world:
        alice = await world.connect("alice")
        start = game.began[0]
        await alice.until("weather")
        assert [began - start for began in game.began] == [0, 1, 3, 7, 15, 31, 63, 123, 183]
        await world.sleep(1000)
        assert len(game.began) == 9  # it has returned by itself
    assert len(world.errors) == 8
    assert world.errors[0].startswith("Unexpected error in background: it begins again after a pause")
    assert "the weather broke" in world.errors[0]


async def test_a_background_cannot_end_the_server(autojump_clock: MockClock) -> None:
    class Exits(Game):
        async def background(self) -> None:
            sys.exit(3)

    async with play(Exits, allow_errors=True) as world:
        await world.sleep(10)
        await world.connect("alice")
    assert "background raised SystemExit(3): a game cannot end the server" in world.errors[0]


async def test_a_background_ends_when_the_server_drains(autojump_clock: MockClock) -> None:
    """What it is in the midst of may end, as handlers may; then it is cancelled, and nobody calls that a mistake."""

    class Rainy(Game):
        def __init__(self) -> None:
            self.ended: list[str] = []

        async def background(self) -> None:
            try:
                while True:
                    await self.run(self.rain)
            finally:
                self.ended.append("cancelled" if isinstance(sys.exception(), trio.Cancelled) else "refused")

        async def rain(self, world: GameWorld) -> None:
            await trio.sleep(2)
            world.data["drops"] = world.data.get("drops", 0) + 1

    game = Rainy()
    async with play(game) as world:
        await world.sleep(5)
        began = trio.current_time()
        await world.restart(Game)
        assert world.data["drops"] == 3
        assert len(game.ended) == 1  # refused its next run, or cancelled before it could ask
        assert trio.current_time() - began < 3


async def test_a_background_that_sleeps_does_not_hold_up_the_drain(autojump_clock: MockClock) -> None:
    class Sleepy(Game):
        async def background(self) -> None:
            await trio.sleep_forever()

    async with play(Sleepy) as world:
        began = trio.current_time()
        await world.restart()
        assert trio.current_time() - began < 0.5


async def test_a_refusal_is_no_mistake(autojump_clock: MockClock) -> None:
    class Strict(Game):
        async def on_command(self, player: Player, command: Command) -> None:
            raise CommandError("No.")

    async with play(Strict) as world:
        alice = await world.connect("alice")
        assert (await alice.command("please")).error == "No."
    assert world.errors == []


async def test_a_run_that_does_not_count_is_no_mistake(autojump_clock: MockClock) -> None:
    """It has seen two values that never were true together, and stumbled over them; the next run does not."""

    class Twins(Game):
        async def on_command(self, player: Player, command: Command) -> int:
            data = player.world.data
            if command.text == "look":
                left = data.get("left", 0)
                await trio.sleep(1)
                assert left == data.get("right", 0)
                return int(left)
            data["left"] = data["right"] = int(command.text)
            return 0

    async with play(Twins) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        saying = await alice.say("look")
        await bob.command("7")
        assert (await saying.reply()).content == 7
