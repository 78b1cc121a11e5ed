"""The whole server and its clients in one process, on virtual time, with faults drawn from a seed.

    python -m tests.simulation --seeds 100 --from 0

``plan.py``
    what happens in a run, as a list of steps drawn from a seed, that is a value and can be cut shorter;
``world.py``
    plays a plan: machine, disk, cables, lives of the server;
``store.py``
    the disk, and what is true: every commit as it was stored, and what a power cut leaves of it;
``clients.py``
    players' devices and publishers, which merge by the rule of docs/protocol.rst;
``game.py``
    the game that runs;
``oracle.py``
    the rules that are checked after each run;
``bugs.py``
    deliberate bugs of the server, and which rule catches each;
``shrink.py``
    the shortest plan that still breaks the rule;
``__main__.py``, ``runs.py``
    the command line, and its workers.
"""
