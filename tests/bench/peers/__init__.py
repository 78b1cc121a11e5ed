"""What the server is measured beside, each as its users would write it, doing the same job.

The job: ``/ws/{player}`` (and ``/sse/{player}``, where the library has HTTP) send a welcome and then what is
published for the player, for the rooms that it has subscribed to, and for all; ``POST /api/messages`` publishes;
a command is answered by its reply. None of them stores anything.
"""
