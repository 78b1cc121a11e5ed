"""What holds for every test."""

pytest_plugins = ["pytester", "tests.support.nothing_left"]
