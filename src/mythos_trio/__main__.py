"""``python -m mythos_trio`` is ``mythos-trio``: so that it can be run under any profiler."""

from mythos_trio.cli import main

if __name__ == "__main__":
    main(prog_name="mythos-trio")
