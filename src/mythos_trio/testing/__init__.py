"""Play scenes of a game in virtual time, with crashes and pulled cables, in a few lines.

    @in_virtual_time
    async def test_the_sword_survives_a_crash() -> None:
        async with play(MyGame) as world:
            alice = await world.connect("alice")
            reply = await alice.command("take sword")
            assert reply.content == "Taken."
            await world.crash()
            assert (await alice.command("inventory")).content == ["sword"]

The whole server runs, on a store of its own and a network in memory: nothing of it is replaced but the wires,
the clock and the randomness.
"""

from mythos_trio.testing.scene import (
    Client,
    GameFailed,
    Message,
    Reply,
    Saying,
    Stored,
    World,
    in_virtual_time,
    play,
    run,
)

__all__ = ["Client", "GameFailed", "Message", "Reply", "Saying", "Stored", "World", "in_virtual_time", "play", "run"]
