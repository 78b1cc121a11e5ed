"""The testing kit: scenes of a game in virtual time, with crashes and pulled cables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mythos_trio.game import Command, CommandError, Game, GameSpecError, Player
from mythos_trio.game import World as GameWorld
from mythos_trio.testing import GameFailed, Message, play, run


class Inn(Game):
    """A bar, a mug that one can take, and a bell that rings."""

    def __init__(self) -> None:
        self.runs = 0

    async def on_join(self, player: Player) -> None:
        player.subscribe("inn")
        player.world.publish("inn", "arrive", player.id)

    async def on_linkdead(self, player: Player) -> None:
        player.world.publish("inn", "nod", player.id)

    async def on_return(self, player: Player) -> None:
        player.world.publish("inn", "wake", player.id)

    async def on_command(self, player: Player, command: Command) -> Any:
        self.runs += 1
        match command.text.split():
            case ["say", text]:
                player.world.publish("inn", "say", text, player=player.id)
                return "Said."
            case ["take"]:
                if "mug" in player.world.data:
                    raise CommandError("It is gone.", holder=player.world.data["mug"])
                player.world.data["mug"] = player.id
                player.data["mugs"] = 1
                return "Taken."
            case ["slowly", text]:
                await trio.sleep(5)
                player.send("slow", text)
                return text
            case ["ring", seconds]:
                player.after(float(seconds), "bell")
                return "Soon."
            case ["trip"]:
                raise RuntimeError("over the carpet")
            case ["leave"]:
                player.disconnect("out with you")
                return "Bye."
            case ["anew"]:
                player.new_session()
        return self.runs

    async def on_timer(self, player: Player, name: str, value: Any) -> None:
        player.send(name, "ding")


def test_a_scene_needs_no_plugin() -> None:
    async def scene() -> float:
        async with play(Inn()) as world:
            alice = await world.connect("alice")
            reply = await alice.command("take")
            assert (reply.ok, reply.content) == (True, "Taken.")
            assert dict(world.data) == {"mug": "alice", "player/alice": {"mugs": 1}}
            assert world.data_of("alice") == {"mugs": 1}
            await world.sleep(3600)
            return trio.current_time()

    assert run(scene) > 3600


async def test_players_hear_each_other_at_once(autojump_clock: MockClock) -> None:
    async with play(Inn) as world:
        alice = await world.connect("alice")
        bob = await world.connect("bob", transports=("sse",))
        assert world.present() == ["alice", "bob"]
        await bob.command("say hello")
        assert alice.heard("say") == bob.heard("say") == ["hello"]
        assert alice.heard("arrive") == ["alice", "bob"]
        assert alice.scroll[-1].fields["player"] == "bob"
        reply = await bob.command("take")
        refused = await alice.command("take")
        assert reply.ok
        assert (refused.ok, refused.error, refused.details) == (False, "It is gone.", {"holder": "bob"})
        assert [message.seq for message in alice.scroll] == sorted({message.seq for message in alice.scroll})


async def test_until_goes_on_behind_what_it_returned(autojump_clock: MockClock) -> None:
    async with play(Inn) as world:
        alice = await world.connect("alice")
        for text in ("one", "two"):
            await alice.command(f"say {text}")
        assert (await alice.until("say")).content == "one"
        assert (await alice.until(lambda message: message.content == "two")).type == "say"
        await alice.command("ring 100")
        began = trio.current_time()
        assert (await alice.until("bell")).content == "ding"
        assert 100 <= trio.current_time() - began < 101
        with pytest.raises(AssertionError, match=r"alice did not get 'bell' within 5 seconds; what came: \[\]"):
            await alice.until("bell", seconds=5)


async def test_a_crash_in_the_midst_of_a_command(autojump_clock: MockClock) -> None:
    """It is asked again, runs from its beginning, and is answered once."""
    async with play(Inn) as world:
        alice = await world.connect("alice")
        await alice.command("say before")
        first = world.game
        saying = await alice.say("slowly soup")
        await world.sleep(4)
        await world.crash()
        assert world.game is not first
        assert isinstance(world.game, Inn)
        reply = await saying.reply()
        assert reply.content == "soup"
        assert world.game.runs == 1
        assert alice.lines.count("soup") == 1
        await world.crash()
        await alice.command("say after")
        assert alice.heard("say") == ["before", "after"]
        assert alice.heard("slow") == ["soup"]


async def test_an_object_outlives_crashes_and_a_class_does_not(autojump_clock: MockClock) -> None:
    game = Inn()
    async with play(game) as world:
        await world.crash()
        assert world.game is game


async def test_a_store_can_be_played_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    for number in range(3):
        async with play(Inn, store=tmp_path / "inn.db") as world:
            alice = await world.connect("alice")
            assert (await alice.command("take")).ok is (number == 0)


async def test_the_cable_is_pulled(autojump_clock: MockClock) -> None:
    async with play(Inn, linkdead_grace=600) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        alice.cut()
        await bob.command("say psst")
        assert (world.presence("alice"), alice.heard("say")) == ("online", [])
        await bob.until("nod")
        assert world.presence("alice") == "linkdead"
        await alice.reconnect()
        assert world.presence("alice") == "online"
        assert alice.heard("say") == ["psst"]
        assert bob.heard("wake") == ["alice"]


async def test_a_cable_is_back_before_anybody_knows(autojump_clock: MockClock) -> None:
    async with play(Inn) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        alice.cut()
        saying = await alice.say("say hello")
        await trio.sleep(1)
        assert not saying.answered
        await alice.reconnect()
        assert (await saying.reply()).ok
        assert bob.heard("say") == alice.heard("say") == ["hello"]


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_one_cable_of_two(transport: Any, autojump_clock: MockClock) -> None:
    async with play(Inn) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        alice.cut(transport)
        await bob.command("say still there?")
        assert alice.heard("say") == []  # three words
        await bob.command("say there?")
        assert alice.heard("say") == ["there?"]
        assert (await alice.command("say yes", seconds=300)).ok
        await alice.reconnect()
        assert bob.heard("nod") == []
        assert len(world._process.server.hub.sessions["alice"].connections) == 2


async def test_leaving_in_order_and_coming_back(autojump_clock: MockClock) -> None:
    async with play(Inn, linkdead_grace=10) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        await alice.leave()
        assert world.presence("alice") == "linkdead"
        await world.sleep(20)
        assert world.presence("alice") == "offline"
        await bob.command("say hm")
        await alice.reconnect()
        assert alice.heard("say") == ["hm"]  # the subscription was kept
        assert (await alice.command("say hi")).ok


async def test_who_was_sent_away_says_so(autojump_clock: MockClock) -> None:
    async with play(Inn) as world:
        alice = await world.connect("alice")
        await alice.command("leave")
        await world.settle()
        assert alice.ended is not None
        assert "out with you" in alice.ended
        with pytest.raises(AssertionError, match=r"alice got no reply to 'look': .*out with you"):
            await alice.command("look")
        await alice.reconnect()
        assert (await alice.command("look")).ok


async def test_a_new_session_goes_on_in_the_same_scroll(autojump_clock: MockClock) -> None:
    async with play(Inn) as world:
        alice = await world.connect("alice", session_id="first")
        assert alice.session_id == "first"
        await alice.command("anew")
        await world.settle()
        assert alice.ended == "session replaced (4501)"
        await alice.reconnect()
        assert alice.session_id != "first"
        assert alice.heard("arrive") == ["alice", "alice"]


async def test_a_restart_with_other_code(autojump_clock: MockClock) -> None:
    class Closed(Inn):
        async def on_command(self, player: Player, command: Command) -> Any:
            return "We are closed."

    async with play(Inn) as world:
        alice = await world.connect("alice")
        await alice.command("say hello")
        await world.restart(Closed)
        assert (await alice.command("say hello")).content == "We are closed."
        assert alice.heard("say") == ["hello"]
        assert alice.heard("arrive") == ["alice"]


async def test_a_task_of_the_games_own(autojump_clock: MockClock) -> None:
    async def rain(world: GameWorld) -> str:
        world.broadcast("weather", "rain")
        return "wet"

    async with play(Inn) as world:
        alice = await world.connect("alice")
        assert await world.run(rain) == "wet"
        assert alice.heard("weather") == ["rain"]


def test_a_mistake_of_the_game_fails_the_scene() -> None:
    async def scene(**options: bool) -> list[str]:
        async with play(Inn, **options) as world:  # type: ignore[arg-type]
            alice = await world.connect("alice")
            reply = await alice.command("trip")
            assert (reply.ok, reply.error_type) == (False, "system_error")
        return world.errors

    with pytest.raises(GameFailed, match=r"(?s)Unexpected error in on_command.*alice.*over the carpet"):
        run(scene)
    (error,) = run(lambda: scene(allow_errors=True))
    assert "over the carpet" in error


def test_what_fails_in_a_scene_is_seen_as_it_is() -> None:
    async def scene() -> None:
        async with play(Inn) as world:
            await world.connect("alice")
            raise LookupError("no group around it")

    with pytest.raises(LookupError, match="no group"):
        run(scene)


def test_what_is_no_game_is_told_at_once() -> None:
    class Misspelt:
        async def on_comand(self, player: Player, command: Command) -> None: ...

    async def scene() -> None:
        async with play(Misspelt):
            raise AssertionError("it has begun")

    with pytest.raises(GameSpecError, match="is on_command meant"):
        run(scene)


async def test_who_is_there_cannot_come_again(autojump_clock: MockClock) -> None:
    async with play(Inn) as world:
        await world.connect("alice")
        with pytest.raises(AssertionError, match="alice is there already"):
            await world.connect("alice")


def test_messages_can_be_compared() -> None:
    assert Message("say", "hi", 1) == Message("say", "hi", 1)
