"""mythos-trio: a real-time connection server on Trio.

A player's session is one numbered, stored stream of messages; any number of WebSocket and SSE
connections carry it at the same time. The map, from the outside in:

========================================  ========================================================================
``cli``, ``reload``, ``scaffold``         the command line; starting anew when code changes; a game to begin with
``supervisor``, ``handover``              a parent that keeps the port; what a process is handed by its parent
``terminal``, ``client``, ``carriers``    a player's client: a line to type in, both transports, their connections
``server``                                what exists, the tree of tasks, how it stops
``front``, ``http1``, ``access``          accept, read a request's head, who may, where it goes
``kept``, ``poller``                      requests that need no task of their own; one task for many sockets
``websocket``, ``sse``, ``streams``       the two transports, and a connection's life on either
``posts``                                 publishing, commands and acknowledgements by POST
``bridge``, ``api``, ``monitor``          Hypercorn and the Quart-Trio app: the API and the monitoring pages
``registrar``, ``session``, ``handlers``  who is in which session; the player's nursery; the game's handlers
``timers``                                the game's timers that run now
``dispatcher``, ``hub``                   from a transaction to what it means in memory
``rounds``, ``connection``                from there to the bytes on each connection
``ledger``, ``explain``                   what runs, and whose it is; what became of a message
``checker``                               pings, verdicts, clean-up, gauges
``link``, ``net``                         the owner of each socket; the seam to the network
``storage``, ``sqlite``                   the promise: what is stored, and in which order
``game``, ``world``                       what a game's author writes; the default game
``testing``                               scenes of a game in virtual time, for its tests
``config``, ``logs``, ``statistics``      settings; what is logged; what is counted
``seams``, ``machine``                    wall clock and randomness; what the machine says of itself
``garbage``, ``turns``                    pauses of the event loop, kept short
``bell``, ``delays``                      how a plain function wakes a task; times that one task keeps for many
``core``                                  the rules: values in, values out
========================================  ========================================================================
"""

from typing import Final

__version__: Final = "0.1.0"
