"""``python -m tests.e2e.bad_clients [--write | --test] [--quiet SECONDS] [CASE …]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Final

from mythos_trio.config import load
from tests.e2e.bad_clients import table
from tests.e2e.bad_clients.cases import BY_NAME, CASES
from tests.e2e.bad_clients.stage import SHORT, Case, Result, bound_of, measure

NO_FILE: Final = "/nowhere/.env"


def play(cases: Sequence[Case], given: Mapping[str, str], quiet_seconds: float, *, together: bool) -> Iterator[Result]:
    """The loud ones one by one, the others beside each other; first the loud ones, or all *together*."""
    longest = sorted(cases, key=lambda case: bound_of(case, load(given, NO_FILE)) or 20.0, reverse=True)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as loud, ThreadPoolExecutor(8) as quiet:
        one = partial(measure, above=Path(directory), given=given, quiet_seconds=quiet_seconds)
        ahead = [loud.submit(one, case) for case in longest if case.loud]
        if not together:
            for future in as_completed(ahead):
                yield future.result()
            ahead = []
        yield from (
            future.result()
            for future in as_completed(ahead + [quiet.submit(one, case) for case in longest if not case.loud])
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.bad_clients", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these; all: " + ", ".join(BY_NAME))
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.rst")
    parser.add_argument("--test", action="store_true", help="short settings, all at once, a line of JSON for each")
    parser.add_argument("--quiet", type=float, default=5.0, metavar="SECONDS", help="how long the quiet run takes")
    options = parser.parse_args(arguments)
    if options.write and (options.cases or options.test):
        parser.error("the table has all cases, with the defaults of the settings")
    cases = [BY_NAME[name] for name in options.cases] or CASES
    results = {}
    for result in play(cases, SHORT if options.test else {}, options.quiet, together=options.test):
        results[result.case.name] = result
        text, wrong = table.as_text(result), result.wrong()
        print(json.dumps([result.case.name, text, wrong]) if options.test else text, flush=True)
    in_order = [results[case.name] for case in cases]
    if options.write:
        table.write(in_order)
    elif not options.test:
        print(f"\n{table.as_rst(in_order)}")
    return 1 if any(result.wrong() for result in in_order) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
