"""Play a scene of a game in virtual time: see `mythos_trio.testing.scene`."""
