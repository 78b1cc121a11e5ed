"""Settings: defaults, parsing, refusals, sources, warnings; docs and code held together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path

import pytest
from dotenv import dotenv_values

from mythos_trio import config
from mythos_trio.config import Reading, SettingError, Settings, load, read

DOCS = Path(__file__).parent.parent / "docs" / "configuration.rst"
KEY = "k" * 32


def reading(tmp_path: Path, dotenv: str = "", environ: Mapping[str, str] | None = None, **options: str) -> Reading:
    path = tmp_path / ".env"
    path.write_text(dotenv)
    path.chmod(0o600)
    return read(environ or {}, path, options)


def test_defaults_of_the_contract() -> None:
    s = Settings()
    assert (s.host, s.port, s.database_url) == ("localhost", 8000, "sqlite:///./data/players/mythos.db")
    assert (s.max_connections_per_player, s.max_total_connections, s.connection_pool_size) == (4, 10_000, 1000)
    assert (s.connection_timeout, s.health_check_interval, s.pong_timeout, s.cleanup_interval) == (300, 30, 20, 60)
    assert (s.max_message_size, s.message_retention, s.message_retention_count) == (65536, 86400, 1000)
    assert (s.max_store_bytes, s.session_retention, s.linkdead_grace) == (1 << 30, 90 * 86400, 120)
    assert (s.handler_timeout, s.write_timeout, s.drain_timeout, s.durability) == (10, 10, 15, "process")
    assert (s.rate_limit_requests, s.rate_limit_window, s.publish_rate_limit) == (100, 10, None)
    assert (s.secret_key, s.cors_origins, s.trusted_proxies, s.log_file) == (None, (), (), "logs/mythos.log")


def test_every_default_is_within_its_own_bounds() -> None:
    for name, spec in config.SPECS.items():
        text = config.default_text(name)
        if text not in ("none", "HOSTNAME-PORT"):
            assert spec.parser.parse(text) == getattr(Settings(), name.lower()), name


def test_defaults_do_not_contradict_each_other(tmp_path: Path) -> None:
    found = reading(tmp_path)
    assert found.warnings == ()
    assert set(found.sources.values()) == {"default"}


def test_lines_of_the_guide_can_be_pasted_in(tmp_path: Path) -> None:
    text = (
        "# Increase health check frequency\n"
        "HEALTH_CHECK_INTERVAL = 15  # seconds\n"
        "CLEANUP_INTERVAL = 30  # seconds\n"
        "CONNECTION_POOL_SIZE = 2000\n"
        "export CONNECTION_TIMEOUT=600\n"
        "export DEBUG=true\n"
        'DATABASE_URL = "sqlite:///./data/players/other.db"\n'
        "PUBLISH_RATE_LIMIT='none'\n"
    )
    found = reading(tmp_path, text)
    s = found.settings
    assert not found.problems
    assert not found.warnings
    assert (s.health_check_interval, s.cleanup_interval, s.connection_pool_size) == (15, 30, 2000)
    assert (s.connection_timeout, s.debug, s.publish_rate_limit) == (600, True, None)
    assert s.database_url == "sqlite:///./data/players/other.db"


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    assert reading(tmp_path, "\ufeffPORT=8001\n").settings.port == 8001


def test_command_line_over_environment_over_file(tmp_path: Path) -> None:
    found = reading(tmp_path, "PORT=1\nHOST=a\nLOG_LEVEL=error\n", {"PORT": "2", "HOST": "b"}, PORT="3")
    assert (found.settings.port, found.settings.host, found.settings.log_level) == (3, "b", "ERROR")
    assert (found.sources["PORT"], found.sources["HOST"]) == ("command line", "environment")
    assert (found.sources["LOG_LEVEL"], found.sources["DURABILITY"]) == (".env", "default")


def test_an_empty_value_is_none(tmp_path: Path) -> None:
    found = reading(tmp_path, "SECRET_KEY=\nPORT=8001\n", {"PORT": " "})
    assert (found.settings.secret_key, found.settings.port) == (None, 8001)


def test_debug_means_log_level_debug_but_for_the_command_line(tmp_path: Path) -> None:
    assert reading(tmp_path, "", {"DEBUG": "1", "LOG_LEVEL": "ERROR"}).settings.log_level == "DEBUG"
    assert reading(tmp_path, "", {"DEBUG": "1"}, LOG_LEVEL="error").settings.log_level == "ERROR"
    assert reading(tmp_path, "", {"DEBUG": "off", "LOG_LEVEL": "ERROR"}).settings.log_level == "ERROR"


BAD = [
    ("DATABASE_URL", "mysql://localhost/db"),
    ("DATABASE_URL", "sqlite://relative.db"),
    ("DATABASE_URL", "sqlite:///"),
    ("DATABASE_URL", "sqlite:///:memory:"),
    ("DATABASE_URL", "sqlite:///data/"),
    ("HOST", "http://localhost"),
    ("HOST", "localhost:8000"),
    ("HOST", "127.0.0.300"),
    ("PORT", "65536"),
    ("PORT", "-1"),
    ("PORT", "http"),
    ("DEBUG", "maybe"),
    ("LOG_LEVEL", "LOUD"),
    ("LOG_FILE", "a\0b"),
    ("LOG_MAX_BYTES", "5"),
    ("LOG_BACKUP_COUNT", "0"),
    ("MAX_CONNECTIONS_PER_PLAYER", "0"),
    ("MAX_TOTAL_CONNECTIONS", "many"),
    ("CONNECTION_TIMEOUT", "0"),
    ("HEALTH_CHECK_INTERVAL", "nan"),
    ("PONG_TIMEOUT", "inf"),
    ("CLEANUP_INTERVAL", "1e9"),
    ("CONNECTION_POOL_SIZE", "1.5"),
    ("MAX_MESSAGE_SIZE", "64KiB"),
    ("MESSAGE_BATCH_SIZE", "0"),
    ("MESSAGE_RETENTION", "-1"),
    ("MESSAGE_RETENTION_COUNT", "0"),
    ("MAX_STORE_BYTES", "1"),
    ("SESSION_RETENTION", "1"),
    ("LINKDEAD_GRACE", "-0.1"),
    ("HANDLER_TIMEOUT", "0"),
    ("WRITE_TIMEOUT", "0"),
    ("DRAIN_TIMEOUT", "0"),
    ("DURABILITY", "forever"),
    ("RATE_LIMIT_REQUESTS", "0"),
    ("RATE_LIMIT_WINDOW", "0"),
    ("PUBLISH_RATE_LIMIT", "0"),
    ("SECRET_KEY", "k" * 31),
    ("CORS_ORIGINS", "*"),
    ("CORS_ORIGINS", "play.example.org"),
    ("CORS_ORIGINS", "https://a.example,https://b.example/path"),
    ("CORS_ORIGINS", "https://a.example:99999"),
    ("TRUSTED_PROXIES", "proxy.example.org"),
    ("SERVER_ID", "a b"),
    ("LEASE_SECONDS", "0"),
]


def test_a_bad_value_is_known_for_every_setting() -> None:
    assert {name for name, _ in BAD} == set(config.SPECS)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_with_name_value_and_what_would_be_right(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(SettingError) as caught:
        load({name: value}, tmp_path / "none")
    error = caught.value
    assert (error.name, error.expected, error.source) == (name, config.SPECS[name].parser.expected, "environment")
    assert name in str(error)
    assert error.expected in str(error)
    if name != "SECRET_KEY":
        assert error.value == value
        assert repr(value) in str(error)


def test_all_problems_are_found_at_once(tmp_path: Path) -> None:
    found = reading(tmp_path, "PORT=x\nDURABILITY=y\nWRITE_TIMEOUT=3\n")
    assert [problem.name for problem in found.problems] == ["PORT", "DURABILITY"]
    assert (found.settings.port, found.settings.write_timeout) == (8000, 3)


def test_a_bad_secret_is_not_repeated(tmp_path: Path) -> None:
    (problem,) = reading(tmp_path, "", {"SECRET_KEY": "hunter2"}).problems
    assert "hunter2" not in str(problem)
    assert "(7 bytes)" in str(problem)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://user:pa:ss@db:5432/mythos", "postgresql://user:********@db:5432/mythos"),
        ("postgresql://user:p@ss@db/mythos", "postgresql://user:********@db/mythos"),
        ("redis://:word@db:6379", "redis://:********@db:6379"),
        ("postgresql://db/mythos?user=a&password=word", "postgresql://db/mythos?user=a&password=********"),
        ("sqlite:////var/lib/m.db", "sqlite:////var/lib/m.db"),
    ],
)
def test_secrets_are_hidden(url: str, shown: str) -> None:
    settings = Settings(database_url=url, secret_key=KEY)
    assert settings.display("DATABASE_URL") == shown
    assert settings.display("SECRET_KEY") == config.HIDDEN
    assert "word" not in repr(settings)
    assert KEY not in repr(settings)


def test_lists(tmp_path: Path) -> None:
    environ = {
        "CORS_ORIGINS": "https://Play.example:443, http://[::1]:3000,",
        "TRUSTED_PROXIES": "127.0.0.1,10.0.0.1/8",
    }
    found = reading(tmp_path, "", environ)
    assert found.settings.cors_origins == ("https://play.example", "http://[::1]:3000")
    assert found.settings.trusted_proxies == (ip_network("127.0.0.1/32"), ip_network("10.0.0.0/8"))
    assert found.settings.display("TRUSTED_PROXIES") == "127.0.0.1,10.0.0.0/8"


def test_what_display_says_can_be_read_back() -> None:
    settings = Settings(cors_origins=("https://a.example",), linkdead_grace=0.5, debug=True, publish_rate_limit=7)
    for name, spec in config.SPECS.items():
        text = settings.display(name)
        if text != "none":
            hidden_or_same = name == "SECRET_KEY" or spec.parser.parse(text) == getattr(settings, name.lower())
            assert hidden_or_same, name


def test_where_the_store_is() -> None:
    assert config.store_path(Settings()) == Path("./data/players/mythos.db")
    assert config.store_path(Settings(database_url="sqlite:////a/b.db")) == Path("/a/b.db")
    for url, kind in [("postgresql://h/d", "postgresql"), ("redis+cluster://h", "redis")]:
        with pytest.raises(config.MissingDriver, match=kind):
            config.store_path(Settings(database_url=url))


@pytest.mark.parametrize(
    ("dotenv", "word"),
    [
        ("PONG_TIMEOUT=200\nHEALTH_CHECK_INTERVAL=200", "CONNECTION_TIMEOUT"),
        ("DRAIN_TIMEOUT=5", "DRAIN_TIMEOUT is less"),
        ("DRAIN_TIMEOUT=100", "systemd"),
        ("MAX_CONNECTIONS_PER_PLAYER=1", "both"),
        ("MAX_TOTAL_CONNECTIONS=3", "MAX_TOTAL_CONNECTIONS"),
        ("MESSAGE_RETENTION=60", "LINKDEAD_GRACE"),
        ("SESSION_RETENTION=3600", "SESSION_RETENTION"),
        ("HOST=0.0.0.0", "protected mode"),
        (f"DEBUG=true\nSECRET_KEY={KEY}", "tracebacks"),
        ("TRUSTED_PROXIES=0.0.0.0/0", "TRUSTED_PROXIES"),
        ("MAX_CONNECTION_PER_PLAYER=3", "did you mean MAX_CONNECTIONS_PER_PLAYER?"),
        ("port=3", "did you mean PORT?"),
        ("= what", "not understood"),
    ],
)
def test_what_looks_wrong_is_said(tmp_path: Path, dotenv: str, word: str) -> None:
    assert any(word in text for text in reading(tmp_path, dotenv).warnings)


def test_a_secret_that_others_can_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(f"SECRET_KEY={KEY}")
    path.chmod(0o644)
    assert any("chmod 600" in text for text in read({}, path).warnings)


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_bytes(b"PORT=\xff\n")
    assert [problem.name for problem in read({}, path).problems] == [".env"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("game.localhost", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("0.0.0.0", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_loopback_names(host: str, expected: bool) -> None:
    assert config.is_loopback_name(host) is expected


def test_server_id_is_fit_for_a_header() -> None:
    spec = config.SPECS["SERVER_ID"]
    assert spec.parser.parse(Settings(port=8001).server_id).endswith("-8001")


def test_template_is_a_dotenv_that_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(config.template())
    assert dotenv_values(path) == {}
    path.write_text(re.sub(r"(?m)^#(?=[A-Z_]+=)", "", config.template()))
    assert set(dotenv_values(path)) == set(config.SPECS)
    assert read({}, path).settings == Settings()


def test_docs_say_what_the_code_does() -> None:
    """Each setting's entry has the default, unit and bounds that the code has, and no other is described."""
    text = DOCS.read_text()
    entries = dict(re.findall(r"(?ms)^``([A-Z_]+)``\n(.+?)(?=^\S|\Z)", text))
    assert set(entries) == set(config.SPECS)
    for name, spec in config.SPECS.items():
        entry = " ".join(entries[name].replace("``", "`").split())
        default = config.default_text(name)
        unit = f" {spec.parser.unit}" if spec.parser.unit and default != "none" else ""
        assert f"Default: `{default}`{unit}." in entry, name
        assert f"Bounds: {spec.parser.bounds}." in entry, name
        assert f"At the bound: {spec.then}" in entry, name
        assert spec.doc in entry, name
