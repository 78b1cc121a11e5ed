"""The store in one SQLite file, for one process.

One connection writes, a few read (WAL: they never wait for each other). Every change is one SQL
transaction; a batch is one too (group commit).

Numbers are reserved ahead: a block of them is set aside in a commit that reaches the disk, and only
then handed out. After a stop that was not in order the next start goes on above the block, so no
number is ever given twice, whatever the last commits were that a power cut took with it.

What an operator may want to see is readable text (times are RFC 3339, bodies are JSON); the tables are
``sessions``, ``connections``, ``subscriptions``, ``messages``, ``answers``, ``requests`` and ``epochs``.
``targets`` keeps, per target, how much is held and the newest number that retention removed; what has
been stored since it was last written is counted in memory, and again at a start (`meta.counted`).
"""

from mythos_trio.sqlite.database import SqliteDatabase

__all__ = ["SqliteDatabase"]
