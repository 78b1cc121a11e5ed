"""What bad clients do. Each row of the table in docs/reliability.rst is one of `CASES`."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from mythos_trio.bridge import BODY_SECONDS as APP_BODY_SECONDS
from mythos_trio.front import HEAD_SECONDS, YIELD_AFTER
from mythos_trio.kept import IDLE_SECONDS
from mythos_trio.link import LINGER_SECONDS
from mythos_trio.net import FAREWELL_SECONDS, SEND_BUFFER
from mythos_trio.posts import BODY_SECONDS
from tests.e2e.bad_clients.stage import Bad, Bound, Case, Stage
from tests.e2e.clients import UPGRADE, CurlSSE, NodeWebSocket, Program, Stream, client_frame

SMALL_BUFFER: Final = 4096
SEND_BUFFERS: Final = 2 * SEND_BUFFER  # Linux doubles it
CROWD: Final = 800
HOST: Final = b"Host: localhost\r\n"
POST: Final = b"POST /api/messages HTTP/1.1\r\n" + HOST
CLOSE: Final = client_frame(8, (1000).to_bytes(2, "big"))

# Bounds.

WRITE: Final = Bound("``WRITE_TIMEOUT``, once all buffers on the way are full", lambda s: s.write_timeout)
LIFE: Final = Bound(
    "``HEALTH_CHECK_INTERVAL`` + ``PONG_TIMEOUT`` + 1 s for the last words",
    lambda s: s.health_check_interval + s.pong_timeout + LINGER_SECONDS,
)
HEAD: Final = Bound("10 s for a request's head + 1 s for the answer", lambda _: HEAD_SECONDS + LINGER_SECONDS)
LINGER: Final = Bound("1 s for the last words", lambda _: LINGER_SECONDS)
# The kernel looks at its limit when it tries again.
FAREWELL: Final = Bound(
    "1 s for the last words; 10 s for the kernel to deliver them, and its next try",
    lambda _: LINGER_SECONDS + FAREWELL_SECONDS + 2,
)
AT_ONCE: Final = Bound("at once; 1 s for the last words", lambda _: LINGER_SECONDS)
RESET: Final = Bound("at once", lambda _: 0.0)
FLOOD: Final = Bound(
    "100 × ``RATE_LIMIT_REQUESTS`` frames: at twice that rate after ``RATE_LIMIT_WINDOW``",
    lambda s: s.rate_limit_window,
)
TURN_SECONDS: Final = 0.01
STAYS: Final = Bound("none: it is only slow", None)


# Who does not read.


def fill(stage: Stage, clients: list[Bad]) -> float:
    """Publish to *clients*, who do not read, more than all buffers hold; until they are gone."""
    stage.pour(12)
    return stage.wait_gone(clients, time.monotonic())


def websocket_never_reads(stage: Stage) -> float:
    return fill(stage, [stage.websocket(player, SMALL_BUFFER) for player in stage.names])


def sse_never_reads(stage: Stage) -> float:
    return fill(stage, [stage.sse(player, SMALL_BUFFER) for player in stage.names])


def reads_a_byte_a_second(stage: Stage) -> float:
    clients = [
        open_(player, SMALL_BUFFER)
        for player, open_ in zip(stage.names, (stage.websocket, stage.sse) * len(stage.names), strict=False)
    ]
    over = threading.Event()
    stage.enclose(over.set)

    def read() -> None:
        while not over.wait(1.0):
            for client in clients:
                with suppress(OSError):
                    client.sock.recv(1)

    threading.Thread(target=read, daemon=True).start()
    return fill(stage, clients)


def reads_just_enough(stage: Stage) -> float:
    """Four times what it has to (kernels hand on in steps), until it has read a megabyte and more."""
    (player,) = stage.names
    client = stage.websocket(player)
    began = time.monotonic()
    pouring = threading.Thread(target=stage.pour, args=(20,))  # it reads from the first byte on
    pouring.start()
    client.read_slowly(4 * 65536 / stage.settings.write_timeout)
    numbers: list[int] = []
    while len(numbers) < 20:
        opcode, payload = client.frame()
        if opcode == 9:
            client.send(client_frame(10, payload))
            continue
        assert opcode == 1, (opcode, payload)
        message = json.loads(payload)
        assert message["type"] in ("line", "heartbeat", "reply"), message
        if message["type"] == "line":
            numbers.append(message["content"]["number"])
    pouring.join()
    assert numbers == list(range(20))
    stage.check_held([client])
    return time.monotonic() - began


def gather_crowd(stage: Stage, count: int) -> int:
    """Have so many players come; how many bytes the list of all tasks is then."""
    for number in range(count):
        stage.sse(f"crowd{number}").drink()
    return len(stage.server.http.get("/monitoring/tasks").content)


def ask_for_tasks(stage: Stage) -> list[Bad]:
    clients = [stage.connect(SMALL_BUFFER) for _ in stage.names]
    for client in clients:
        client.send(b"GET /monitoring/tasks HTTP/1.1\r\n" + HOST + b"\r\n")
    return clients


def app_answer_never_read(stage: Stage) -> float:
    assert gather_crowd(stage, CROWD) > 1.2 * SEND_BUFFERS
    return stage.wait_gone(ask_for_tasks(stage), time.monotonic())


def short_answer_never_read(stage: Stage) -> float:
    assert 2 * SMALL_BUFFER < gather_crowd(stage, 100) < SEND_BUFFERS
    clients = ask_for_tasks(stage)
    since = time.monotonic()
    stage.wait_gone(clients, since)
    return stage.wait_kernel(clients, since)


def vanishes_before_its_answer(stage: Stage) -> float:
    """The process is through with it soon; the kernel keeps the answer, and must not keep it for minutes."""
    clients = [stage.connect() for _ in stage.names]
    for client in clients:
        client.send(b"GET /monitoring/tasks HTTP/1.1\r\n" + HOST)
    time.sleep(0.2)
    for client in clients:
        client.send(b"\r\n")
        client.cut_the_cable()
    since = time.monotonic()
    stage.wait_gone(clients, since)
    return stage.wait_kernel(clients, since)


def replies_never_read(stage: Stage) -> float:
    """Posts one after the other on one connection; the publications are wrong, so they cost nothing."""
    clients = [stage.connect(SMALL_BUFFER) for _ in stage.names]
    request = POST + b"Content-Length: 2\r\n\r\n{}"
    for client in clients:
        client.flood(request * 100)
    return stage.wait_gone(clients, time.monotonic())


def handshake_never_read(stage: Stage) -> float:
    clients = [stage.connect(SMALL_BUFFER) for _ in stage.names]
    for client, player in zip(clients, stage.names, strict=True):
        client.send(UPGRADE.format(path=f"/ws/{player}").encode())
    return stage.wait_gone(clients, time.monotonic())


# Who does not end what was begun.


def trickle(clients: list[Bad], piece: bytes, stage: Stage) -> None:
    """Send a little every now and then, for ever, in a thread."""
    over = threading.Event()
    stage.enclose(over.set)

    def send() -> None:
        while not over.wait(0.3):
            for client in clients:
                with suppress(OSError):
                    client.sock.sendall(piece)

    threading.Thread(target=send, daemon=True).start()


def handshake_never_ends(stage: Stage) -> float:
    since = time.monotonic()
    clients = [stage.connect() for _ in stage.names]
    for client, player in zip(clients[1:], stage.names[1:], strict=True):  # the first says nothing at all
        client.send(UPGRADE.format(path=f"/ws/{player}").encode()[:-2])
    return stage.wait_gone(clients, since)


def head_for_ever(stage: Stage) -> float:
    since = time.monotonic()
    clients = [stage.connect() for _ in stage.names]
    for client in clients:
        client.send(b"GET /health HTTP/1.1\r\n" + HOST + b"X-Long: ")
    trickle(clients, b"x", stage)
    return stage.wait_gone(clients, since)


def body_for_ever(stage: Stage) -> float:
    since = time.monotonic()
    clients = [stage.connect() for _ in stage.names]
    for number, client in enumerate(clients):
        framing = b"Content-Length: 100000" if number % 2 else b"Transfer-Encoding: chunked"
        client.send(POST + framing + b"\r\n\r\n")
    trickle(clients[::2], b"1\r\nx\r\n", stage)
    trickle(clients[1::2], b"x", stage)
    return stage.wait_gone(clients, since)


def app_body_for_ever(stage: Stage) -> float:
    since = time.monotonic()
    clients = [stage.connect() for _ in stage.names]
    for client in clients:
        head = b"POST /api/connections/nobody/session HTTP/1.1\r\nContent-Type: application/json\r\n"
        client.send(head + HOST + b"Content-Length: 100000\r\n\r\n")
    trickle(clients, b" ", stage)
    return stage.wait_gone(clients, since)


def keep_alive(stage: Stage) -> list[Bad]:
    """Clients that have had their first answer on a connection that is kept."""
    clients = [stage.connect() for _ in stage.names]
    for client in clients:
        client.send(POST + b"Content-Length: 2\r\n\r\n{}")
    for client in clients:
        assert client.answer().status == 422
    return clients


def second_head_for_ever(stage: Stage) -> float:
    clients = keep_alive(stage)
    since = time.monotonic()
    for client in clients:
        client.send(POST + b"X-Long: ")
    trickle(clients, b"x", stage)
    return stage.wait_gone(clients, since)


def idles_between_posts(stage: Stage) -> float:
    clients = keep_alive(stage)
    return stage.wait_gone(clients, time.monotonic())


def kept_by_the_thousand(stage: Stage) -> float:
    """More than may idle: the one that has idled longest makes room, and newcomers get in."""
    clients = []
    pool = stage.settings.connection_pool_size
    for _ in stage.names:
        client = stage.connect()
        client.send(POST + b"Content-Length: 2\r\n\r\n{}")
        assert client.answer().status == 422
        clients.append(client)
    seconds = stage.wait_gone(clients[:-pool], time.monotonic())
    stage.check_held(clients[-pool // 2 :])
    return seconds


# Who vanishes.


def vanishes_from_websocket(stage: Stage) -> float:
    clients = [stage.websocket(player) for player in stage.names]
    for client in clients:
        client.cut_the_cable()
    return stage.wait_gone(clients, time.monotonic())


def vanishes_from_sse(stage: Stage) -> float:
    clients = [stage.sse(player) for player in stage.names]
    for client in clients:
        client.cut_the_cable()
    return stage.wait_gone(clients, time.monotonic())


def pause(stage: Stage, client: Program) -> set[int]:
    """Stop the program, not the connection: its kernel goes on acknowledging. The client's port."""
    stage.enclose(client.close)
    stage.enclose(lambda: client.process.send_signal(signal.SIGCONT))
    assert isinstance(client, Stream)
    assert client.welcome
    ports = stage.ports_of(client.process.pid)
    client.process.send_signal(signal.SIGSTOP)
    return ports


def paused_with_websocket(stage: Stage) -> float:
    client = NodeWebSocket(f"ws://127.0.0.1:{stage.server.port}/ws/bad0")
    return stage.wait_gone(pause(stage, client), time.monotonic())


def paused_with_sse(stage: Stage) -> float:
    """Nothing tells it from one that reads, as long as its kernel has room for what is sent."""
    client = CurlSSE(f"http://127.0.0.1:{stage.server.port}/sse/bad0")
    assert client.welcome
    ports = pause(stage, client)
    time.sleep(1.5 * (stage.settings.health_check_interval + stage.settings.pong_timeout))
    assert stage.held(ports) == ports, "its kernel has acknowledged everything, and yet it was sent away"
    stage.pour(20)
    return stage.wait_gone(ports, time.monotonic())


# Who floods.


def pings(stage: Stage) -> float:
    return flood(stage, client_frame(9, b"are you there?") * 1000, drink=True)


def pings_unread(stage: Stage) -> float:
    return flood(stage, client_frame(9, b"are you there?" * 8) * 1000, drink=False)


def empty_fragments(stage: Stage) -> float:
    """A message that never ends, and never grows."""
    return flood(stage, client_frame(0, b"", final=False) * 1000, first=client_frame(1, b"x", final=False))


def wrong_messages(stage: Stage) -> float:
    return flood(stage, client_frame(1, b'{"type": "nonsense"}') * 1000)


def commands(stage: Stage) -> float:
    return flood(stage, client_frame(1, b'{"type": "command", "content": "echo x"}') * 1000)


def flood(stage: Stage, data: bytes, *, first: bytes = b"", drink: bool = True) -> float:
    clients = [stage.websocket(player) for player in stage.names]
    since = time.monotonic()
    for client in clients:
        client.send(first)
        if drink:
            client.drink()
        client.flood(data)
    return stage.wait_gone(clients, since)


def endless_message(stage: Stage) -> float:
    clients = [stage.websocket(player) for player in stage.names]
    since = time.monotonic()
    for client in clients:
        client.send(client_frame(1, b"x" * 1000, final=False))
        client.flood(client_frame(0, b"x" * 1000, final=False))
    return stage.wait_gone(clients, since)


def huge_frame(stage: Stage) -> float:
    clients = [stage.websocket(player) for player in stage.names]
    since = time.monotonic()
    for client in clients:
        client.send(client_frame(1, b"", length=2**62))
    return stage.wait_gone(clients, since)


def talks_on_sse(stage: Stage) -> float:
    clients = [stage.sse(player) for player in stage.names]
    since = time.monotonic()
    for client in clients:
        client.flood(b"x" * 65536)
    return stage.wait_gone(clients, since)


# Who comes and goes.


def abandons(stage: Stage) -> float:
    """Opens, gets somewhere, and leaves, by a reset or in good order."""
    dice = random.Random(7)
    stages = [
        b"",
        b"GET /he",
        b"GET /sse/{} HTTP/1.1\r\n" + HOST + b"\r\n",
        UPGRADE.encode().replace(b"{path}", b"/ws/{}"),
        UPGRADE.encode().replace(b"{path}", b"/ws/{}") + client_frame(1, b"echo x")[:5],
        POST + b"Content-Length: 100\r\n\r\n{",
        POST + b"Content-Length: 2\r\n\r\n{}",
        b"GET /monitoring/tasks HTTP/1.1\r\n" + HOST + b"\r\n",
    ]
    ports = set()
    for player in stage.names:
        client = stage.connect()
        ports.add(client.port)
        with suppress(OSError):
            client.send(dice.choice(stages).replace(b"{}", player.encode()))
        if dice.random() < 0.5:
            client.reset()
        else:
            client.close()
    return stage.wait_gone(ports, time.monotonic())


def silent_by_the_thousand(stage: Stage) -> float:
    """As many as may be in their handshake, and then some, who say nothing. *measured*: until a newcomer is in."""
    clients = [stage.connect() for _ in stage.names]
    since = time.monotonic()
    newcomer = stage.websocket("newcomer")
    seconds = time.monotonic() - since
    stage.wait_gone(clients, since)
    newcomer.close()
    return seconds


def resets_in_a_frame(stage: Stage) -> float:
    """In the middle of a frame that it sends, and of one that it is sent."""
    clients = [stage.websocket(player, SMALL_BUFFER) for player in stage.names]
    half = len(clients) // 2
    stage.pour(6)
    for client in clients[:half]:
        client.send(client_frame(1, b"echo half of it")[:9])
    ports = {client.port for client in clients}
    since = time.monotonic()
    for client in clients:
        client.reset()
    return stage.wait_gone(ports, since)


def ignores_the_close(stage: Stage) -> float:
    """Is told to go, reads it or not, and does nothing."""
    clients = [open_(player) for player, open_ in zip(stage.names, (stage.websocket, stage.sse) * 50, strict=False)]
    since = time.monotonic()
    for player in stage.names:
        assert stage.server.http.delete(f"/api/connections/{player}").json()["success"]
    return stage.wait_gone(clients, since)


def closes_and_stays(stage: Stage) -> float:
    """Says goodbye and does not close."""
    clients = [stage.websocket(player) for player in stage.names]
    since = time.monotonic()
    for client in clients:
        client.send(CLOSE)
    return stage.wait_gone(clients, since)


def _case(
    play: Callable[[Stage], float],
    does: str,
    bound: Bound,
    clients: int = 20,
    *,
    crowd: int = 0,
    work: float = 0.0,
    loud: bool = False,
    **settings: str,
) -> Case:
    return Case(play.__name__.replace("_", "-"), does, bound, play, clients, crowd, work, loud, settings)


CASES: Final = (
    _case(websocket_never_reads, "never reads its WebSocket", WRITE),
    _case(sse_never_reads, "never reads its event stream", WRITE),
    _case(
        app_answer_never_read,
        "never reads a long answer of the app, behind Hypercorn",
        WRITE,
        2,
        crowd=CROWD,
        work=20.0,
    ),
    _case(short_answer_never_read, "never reads an answer that fits into the server's kernel; its part too", FAREWELL),
    _case(replies_never_read, "posts and posts on one connection and never reads the answers", WRITE, 5, loud=True),
    _case(handshake_never_read, "never reads the answer to its WebSocket handshake", LIFE),
    _case(reads_a_byte_a_second, "reads a byte a second of either, while much is sent", WRITE),
    _case(reads_just_enough, "reads four times 64 KiB in ``WRITE_TIMEOUT``, while much is sent", STAYS, 1),
    _case(vanishes_from_websocket, "vanishes from its WebSocket without a word (cable pulled)", LIFE),
    _case(vanishes_from_sse, "vanishes from its event stream without a word", LIFE),
    _case(
        vanishes_before_its_answer,
        "vanishes before the answer to its request has come; the kernel's part too",
        FAREWELL,
    ),
    _case(paused_with_websocket, "is stopped (``SIGSTOP``) with a WebSocket", LIFE, 1),
    _case(
        paused_with_sse,
        "is stopped with an event stream: its kernel acknowledges until it is full, and until then it counts as alive",
        WRITE,
        1,
    ),
    _case(handshake_never_ends, "says nothing, or half of a WebSocket handshake", HEAD),
    _case(head_for_ever, "sends a request's head for ever", HEAD),
    _case(
        body_for_ever,
        "sends a publication's body for ever",
        Bound("30 s for a body + 1 s for the answer", lambda _: BODY_SECONDS + LINGER_SECONDS),
    ),
    _case(
        app_body_for_ever,
        "sends the body of another request for ever",
        Bound("10 s for a body + 1 s for the answer", lambda _: APP_BODY_SECONDS + LINGER_SECONDS),
    ),
    _case(second_head_for_ever, "sends the head of its second request for ever", HEAD),
    _case(
        idles_between_posts,
        "keeps a connection after a request and says nothing",
        Bound("75 s between two requests + 1 s for its own close", lambda _: IDLE_SECONDS + LINGER_SECONDS),
    ),
    _case(
        kept_by_the_thousand,
        "keeps more connections after a request than ``CONNECTION_POOL_SIZE``",
        Bound("at once, who has idled longest: 10 ms each", lambda _: 500 * TURN_SECONDS),
        1500,
        loud=True,
        CONNECTION_POOL_SIZE="1000",
    ),
    _case(
        silent_by_the_thousand,
        "opens more connections than ``CONNECTION_POOL_SIZE`` and says nothing; until a newcomer is in",
        Bound("1 s, who has been silent longest", lambda _: YIELD_AFTER),
        1500,
        CONNECTION_POOL_SIZE="1000",
    ),
    _case(
        abandons,
        "opens thousands of connections and leaves them in all states, by reset or not",
        Bound("at once, when it is their turn: 10 ms each", lambda _: 2000 * TURN_SECONDS),
        2000,
        work=30.0,
        loud=True,
    ),
    _case(resets_in_a_frame, "resets in the middle of a frame, its own or the server's", RESET),
    _case(ignores_the_close, "is sent away on either transport and does not go", LINGER),
    _case(closes_and_stays, "sends a close frame and keeps the connection", LINGER),
    _case(pings, "floods pings and reads the pongs", FLOOD, 3, loud=True),
    _case(pings_unread, "floods pings and does not read the pongs", FLOOD, 3, loud=True),
    _case(empty_fragments, "sends a message of endlessly many empty fragments", FLOOD, 3, loud=True),
    _case(wrong_messages, "floods messages that mean nothing", FLOOD, 3, loud=True),
    _case(
        commands,
        "floods commands",
        Bound("2 × ``RATE_LIMIT_REQUESTS`` commands", lambda s: s.rate_limit_window),
        3,
        loud=True,
    ),
    _case(
        endless_message,
        "sends a message without end",
        Bound("``MAX_MESSAGE_SIZE`` bytes; 1 s for the last words", lambda _: LINGER_SECONDS),
    ),
    _case(huge_frame, "announces a frame of 2\\ :sup:`62` bytes", AT_ONCE),
    _case(talks_on_sse, "talks for ever on its event stream", Bound("64 KiB; 1 s", lambda _: LINGER_SECONDS), 5),
)
BY_NAME: Final = {case.name: case for case in CASES}
