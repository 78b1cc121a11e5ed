"""Clients as bad as can be, against a server process: each hurts only itself, and is gone within a published bound.

``python -m tests.e2e.bad_clients`` plays the cases with the settings' defaults and prints the table of
docs/reliability.rst; ``--write`` puts it there. ``tests/e2e/test_bad_clients.py`` plays them with short ones.

* ``cases``: what each bad client does, and the bound that holds for it.
* ``stage``: a server with good clients beside it, what is measured, and what is wrong with it.
* ``witness``: the good clients, in a process of their own.
* ``table``: the figures as a table.
"""
