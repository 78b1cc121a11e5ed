/*
 * The load generator of `nox -s bench`: players on WebSocket and SSE, publishers over HTTP, one epoll loop.
 *
 * It must cost far less than the servers, so it looks at as little as it can: frames by their length, messages by
 * a marker "@0000000123@" in their text, which names the message. What it never leaves out is the counting: each
 * message has to arrive exactly once on each connection of its target, and nowhere else.
 *
 *   load publish   players get what publishers send: to all, to one player, or to a room (--target)
 *   load command   players give commands and get replies
 *   load connect   players come, get their welcome and leave, again and again
 *   load idle      players come and stay until standard input ends
 *   load resume    players come, go, miss messages and come back all at once
 *
 * The result is one JSON object on standard output; the connections stay until standard input ends. Processor time is measured here, right around the measured
 * part: the server's by its process's clock (all threads, also those that have ended), in microseconds. After the
 * last delivery there is a pause that belongs to the measured processor time, so that what a server puts off
 * (logs, notes) counts as well.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NUMBER_DIGITS 10
#define MARKER_SIZE (NUMBER_DIGITS + 2)
#define BUSY 4009 /* the close code of a server that is too busy to let one in */
#define READ_SIZE (256 * 1024)
#define PAUSE_SECONDS 0.3 /* for what a server puts off */
#define SETTLE_SECONDS 0.5 /* between the last connect and the first message */
#define GROUP_MAX 32 /* connections of a player or a room: bits of a message's mask */

typedef enum { WS, SSE, HTTP } Kind;
typedef enum { CONNECTING, HEAD, OPENING, SUBSCRIBING, READY, CLOSING, DEAD } State;
typedef enum { ALL, PLAYER, ROOM } Target;

typedef struct {
    int fd;
    Kind kind;
    State state;
    int publisher; /* publishes; over HTTP, or, where the peer has no HTTP, over WebSocket */
    uint32_t player, member; /* member: which bit of a group's mask is this connection's */
    char *in; /* bytes of a frame, an event or a head that is not complete */
    size_t in_size, in_room;
    char *out; /* bytes that the kernel has not taken yet */
    size_t out_size, out_room;
    uint64_t *got; /* bit n: message n has come (target ALL, resume) */
    uint32_t current; /* the publisher's message that is not answered yet, or the player's command */
    uint32_t received;
    int busy;
    double began;
    char session[80], position[48];
} Conn;

typedef struct {
    double due;
    uint32_t target, remaining, mask;
    int answered;
} Message;

static struct {
    const char *mode, *host, *dialect, *content, *transports;
    int port, players, room_size, publishers, window, concurrency, size, missed, publish_ws, all_new, settle_ms;
    double rate, seconds, timeout;
    uint32_t count, warm;
    Target target;
    pid_t pid;
} opt = {.mode = "", .host = "127.0.0.1", .dialect = "plain", .transports = "ws", .players = 100, .room_size = 20,
         .publishers = 1, .window = 1, .concurrency = 128, .size = 200, .missed = 100, .seconds = 0, .timeout = 60,
         .settle_ms = -1};

static Conn *conns;
static int conn_count, ready, opening, ep, messages_room, publishers_from;
static Message *messages;
static uint32_t published, answered, inflight, wrong, duplicates, refused, closed_early, retried, measured_from;
static uint64_t delivered, deliveries_wanted, random_state = 88172645463325252ULL;
static double stop_at, next_due, last_arrival;
static int publishing, measuring, source_address;
static char shared[READ_SIZE + 1];
static char pad[70000];

/* Latencies: 64 buckets for each power of two of nanoseconds, so within 1.6 %. */
static uint64_t buckets[64 * 64], latencies;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(3);
}

static double cpu_of(pid_t pid) { /* seconds of all threads */
    clockid_t clock = CLOCK_PROCESS_CPUTIME_ID;
    struct timespec t;
    if (pid && clock_getcpuclockid(pid, &clock)) die("process %d: no clock", (int)pid);
    if (clock_gettime(clock, &t)) die("process %d has ended", (int)pid);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double user_of(pid_t pid) { /* seconds in user space, by the tick */
    char path[64], line[1024];
    unsigned long user = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    size_t size = fread(line, 1, sizeof line - 1, file);
    fclose(file);
    line[size] = 0;
    char *rest = strrchr(line, ')');
    if (rest) sscanf(rest + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu", &user);
    return user / (double)sysconf(_SC_CLK_TCK);
}

static void latency(double seconds) {
    if (!measuring) return;
    uint64_t ns = seconds <= 0 ? 1 : (uint64_t)(seconds * 1e9) + 1;
    int top = 63 - __builtin_clzll(ns);
    int fine = top >= 6 ? (int)(ns >> (top - 6)) & 63 : (int)(ns << (6 - top)) & 63;
    buckets[top * 64 + fine]++;
    latencies++;
}

static double percentile(double share) { /* milliseconds */
    uint64_t rank = (uint64_t)ceil(share * latencies), seen = 0;
    for (int i = 0; i < 64 * 64; i++)
        if ((seen += buckets[i]) >= rank && buckets[i]) return ldexp(1 + (i % 64 + 0.5) / 64, i / 64) * 1e-6;
    return 0;
}

static uint32_t random_below(uint32_t limit) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (uint32_t)((random_state >> 11) % limit);
}

/* --- sockets --- */

static void watch(Conn *c, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.u32 = (uint32_t)(c - conns)};
    if (epoll_ctl(ep, operation, c->fd, &event)) die("epoll_ctl: %s", strerror(errno));
}

static void keep(char **buffer, size_t *size, size_t *room, const void *data, size_t more) {
    if (*size + more > *room) {
        *room = (*size + more) * 2;
        if (!(*buffer = realloc(*buffer, *room))) die("no memory");
    }
    memcpy(*buffer + *size, data, more);
    *size += more;
}

static void shut(Conn *c) {
    if (c->fd >= 0) close(c->fd);
    if (c->fd >= 0 && c->state < READY) opening--;
    c->fd = -1;
    c->state = DEAD;
    c->in_size = c->out_size = 0;
}

static void lost(Conn *c, const char *why) { /* a connection that ends before it should */
    if (closed_early++ < 3)
        fprintf(stderr, "load: connection %d (player %u, kind %d, state %d): %s: %.300s\n", (int)(c - conns), c->player,
                c->kind, c->state, why, c->in_size ? (keep(&c->in, &c->in_size, &c->in_room, "", 1), c->in) : "");
    if (c->state >= READY && c->state != DEAD && !c->publisher) ready--;
    shut(c);
}

static void put(Conn *c, const void *data, size_t size) {
    ssize_t sent = 0;
    if (!c->out_size) {
        sent = send(c->fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) return; /* reading says why */
        if (sent < 0) sent = 0;
    }
    if ((size_t)sent < size) {
        if (!c->out_size) watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
        keep(&c->out, &c->out_size, &c->out_room, (const char *)data + sent, size - sent);
    }
}

static void flush(Conn *c) {
    ssize_t sent = send(c->fd, c->out, c->out_size, MSG_NOSIGNAL);
    if (sent <= 0) return;
    memmove(c->out, c->out + sent, c->out_size - sent);
    if (!(c->out_size -= sent)) watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static void put_frame(Conn *c, int opcode, const char *payload, size_t size) {
    static char frame[70100];
    uint32_t mask = random_below(0xffffffffu) | 1;
    size_t at = 0;
    frame[at++] = (char)(0x80 | opcode);
    if (size < 126) frame[at++] = (char)(0x80 | size);
    else frame[at++] = (char)(0x80 | 126), frame[at++] = (char)(size >> 8), frame[at++] = (char)size;
    memcpy(frame + at, &mask, 4);
    for (size_t i = 0; i < size; i++) frame[at + 4 + i] = payload[i] ^ frame[at + i % 4];
    put(c, frame, at + 4 + size);
}

static void open_connection(Conn *c) {
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET, .sin_port = htons(opt.port)};
    int on = 1;
    inet_pton(AF_INET, opt.host, &to.sin_addr);
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)) < 0) die("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    /* Many addresses of loopback, so that the ports do not run out. */
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    from.sin_addr.s_addr = htonl(0x7f000002u + (uint32_t)(source_address++ % 200));
    if (bind(c->fd, (struct sockaddr *)&from, sizeof from)) die("bind: %s", strerror(errno));
    c->state = CONNECTING;
    opening++;
    c->in_size = c->out_size = 0;
    c->busy = 0;
    c->began = now();
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) die("connect: %s", strerror(errno));
    watch(c, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

static void opened(Conn *c) {
    c->state = READY;
    opening--;
    if (!c->publisher) ready++;
}

static void say_hello(Conn *c) {
    char head[1024], path[200], query[200] = "";
    const char *upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                          "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n";
    if (c->kind == HTTP) {
        opened(c);
        return;
    }
    if (c->position[0]) snprintf(query, sizeof query, "?session_id=%s&position=%s", c->session, c->position);
    if (c->publisher) strcpy(path, "/publish");
    else if (c->kind == SSE) snprintf(path, sizeof path, "/sse/p%u", c->player);
    else if (!strcmp(opt.dialect, "socketio")) strcpy(path, "/socket.io/?EIO=4&transport=websocket");
    else snprintf(path, sizeof path, "/ws/p%u", c->player);
    int size = snprintf(head, sizeof head, "GET %s%s HTTP/1.1\r\nHost: localhost:%d\r\n%s\r\n", path, query, opt.port,
                        c->kind == SSE ? "Accept: text/event-stream\r\n" : upgrade);
    c->state = HEAD;
    put(c, head, size);
}

/* --- publishing and commanding --- */

static Message *new_message(double due, uint32_t target, uint32_t remaining) {
    if ((int)published == messages_room) {
        messages_room = messages_room ? messages_room * 2 : 65536;
        if (!(messages = realloc(messages, messages_room * sizeof *messages))) die("no memory");
    }
    messages[published] = (Message){.due = due, .target = target, .remaining = remaining};
    deliveries_wanted += remaining;
    inflight++;
    return &messages[published++];
}

/* The `message` of a publication is opt.size bytes of JSON. */
static int message_json(char *text, uint32_t number) {
    int size = sprintf(text, "{\"type\":\"line\",\"content\":{\"text\":\"@%0*u@", NUMBER_DIGITS, number);
    int padding = opt.size - size - 3;
    if (padding > 0) size += sprintf(text + size, "%.*s", padding, pad);
    return size + sprintf(text + size, "\"}}");
}

static int publication_json(char *text, uint32_t number, Target target, uint32_t to) {
    int size = target == ALL      ? sprintf(text, "{\"broadcast\":true,\"message\":")
               : target == PLAYER ? sprintf(text, "{\"player_id\":\"p%u\",\"message\":", to)
                                  : sprintf(text, "{\"channel\":\"room-%u\",\"message\":", to);
    size += message_json(text + size, number);
    text[size++] = '}';
    return size;
}

static void post(Conn *c, const char *body, size_t size) {
    static char *request;
    static size_t room;
    if (c->kind == WS) {
        put_frame(c, 1, body, size);
        return;
    }
    if (size + 300 > room && !(request = realloc(request, room = size + 300))) die("no memory");
    int head = sprintf(request, "POST /api/messages HTTP/1.1\r\nHost: localhost:%d\r\nContent-Type: application/json\r\n"
                       "Content-Length: %zu\r\n\r\n", opt.port, size);
    memcpy(request + head, body, size);
    put(c, request, head + size);
}

static void publish(Conn *c, double due) {
    static char body[70000];
    uint32_t to = 0, remaining;
    int each = !strcmp(opt.transports, "both") ? 2 : 1;
    switch (opt.target) {
    case ALL: remaining = (uint32_t)ready; break;
    case PLAYER: to = random_below(opt.players), remaining = each; break;
    default: to = random_below(opt.players / opt.room_size), remaining = opt.room_size * each;
    }
    c->current = published;
    c->busy = 1;
    new_message(due, to, remaining);
    post(c, body, publication_json(body, c->current, opt.target, to));
}

static void command(Conn *c, double due) {
    static char text[70000];
    c->current = published;
    c->busy = 1;
    new_message(due, (uint32_t)(c - conns), 1);
    if (!strcmp(opt.dialect, "socketio")) {
        int size = sprintf(text, "42[\"command\",{\"type\":\"command\",\"id\":\"@%0*u@\",\"content\":\"", NUMBER_DIGITS, c->current);
        size += sprintf(text + size, "%.*s\"}]", opt.size - size + 10 > 3 ? opt.size - size + 10 : 3, pad);
        put_frame(c, 1, text, size);
        return;
    }
    int size = sprintf(text, "{\"type\":\"command\",\"id\":\"@%0*u@\",\"content\":\"", NUMBER_DIGITS, c->current);
    if (opt.content) size += sprintf(text + size, "%s\"}", opt.content);
    else size += sprintf(text + size, "%.*s\"}", opt.size - size > 5 ? opt.size - size - 2 : 3, pad);
    put_frame(c, 1, text, size);
}

static int may_send(double t) {
    if (!publishing || (stop_at && t >= stop_at)) return 0;
    return !opt.count || published < measured_from + opt.count;
}

/* Whoever is idle sends: as the rate says, or at once as far as the window admits. */
static void send_due(double t) {
    static int turn;
    int commanding = !strcmp(opt.mode, "command");
    int from = commanding ? 0 : publishers_from, count = commanding ? opt.players : opt.publishers;
    for (int tried = 0; tried < count && may_send(t); tried++) {
        Conn *c = &conns[from + turn % count];
        if (opt.rate && measuring && next_due > t) return;
        if (!commanding && opt.window && inflight >= (uint32_t)opt.window) return;
        turn++;
        if (c->busy || c->state != READY) continue;
        double due = opt.rate && measuring ? next_due : t;
        if (opt.rate && measuring) next_due += 1 / opt.rate;
        commanding ? command(c, due) : publish(c, due);
    }
}

/* One more sender is free: the usual case of a closed loop, without looking at the others. */
static void send_again(Conn *c, double t) {
    if (opt.rate && measuring) return; /* `send_due` is called by the clock */
    if (!may_send(t) || c->state != READY || c->busy) return;
    if (strcmp(opt.mode, "command") && opt.window && inflight >= (uint32_t)opt.window) return;
    !strcmp(opt.mode, "command") ? command(c, t) : publish(c, t);
}

static void settled(Message *m) { /* delivered everywhere, and answered */
    if (m->remaining == 0 && m->answered) {
        inflight--;
        if (opt.window && !opt.rate && strcmp(opt.mode, "command")) send_due(now());
    }
}

static void post_answered(Conn *c, int good, double t) {
    if (!good) refused++;
    if (!c->busy) die("an answer that nobody has asked for");
    c->busy = 0;
    answered++;
    if (!strcmp(opt.mode, "resume")) return;
    Message *m = &messages[c->current];
    m->answered = 1;
    if (!good) {
        deliveries_wanted -= m->remaining;
        m->remaining = 0;
    }
    settled(m);
    send_again(c, t);
}

static void arrived(Conn *c, uint32_t n, double t) {
    c->received++;
    if (!strcmp(opt.mode, "resume")) {
        if (n / opt.missed != c->player) wrong++;
        else if (c->got[n % opt.missed / 64] & 1ULL << n % opt.missed % 64) duplicates++;
        else if (n % opt.missed != c->received - 1) wrong++; /* out of order */
        else {
            delivered++, last_arrival = t;
            c->got[n % opt.missed / 64] |= 1ULL << n % opt.missed % 64;
            if (c->received == (uint32_t)opt.missed) latency(t - c->began);
        }
        return;
    }
    if (n >= published) {
        wrong++;
        return;
    }
    Message *m = &messages[n];
    if (!strcmp(opt.mode, "command")) {
        if (m->target != (uint32_t)(c - conns)) wrong++;
        else if (m->answered) duplicates++;
        else {
            m->answered = 1, m->remaining = 0, c->busy = 0;
            delivered++, answered++, last_arrival = t, latency(t - m->due);
            inflight--;
            send_again(c, t);
        }
        return;
    }
    if (opt.target == ALL) {
        if (c->got[n / 64] & 1ULL << n % 64) {
            duplicates++;
            return;
        }
        c->got[n / 64] |= 1ULL << n % 64;
    } else {
        uint32_t group = opt.target == PLAYER ? c->player : c->player / opt.room_size;
        if (group != m->target) {
            wrong++;
            return;
        }
        if (m->mask & 1u << c->member) {
            duplicates++;
            return;
        }
        m->mask |= 1u << c->member;
    }
    delivered++, last_arrival = t, latency(t - m->due);
    if (m->remaining) m->remaining--;
    settled(m);
}

/* --- reading --- */

static void copy_field(const char *text, size_t size, const char *name, char *to, size_t room) {
    char *at = memmem(text, size, name, strlen(name));
    to[0] = 0;
    if (!at) return;
    at += strlen(name);
    char *end = memchr(at, '"', text + size - at);
    if (end && (size_t)(end - at) < room) memcpy(to, at, end - at), to[end - at] = 0;
}

static void join_room(Conn *c) {
    char text[200];
    const char *form = !strcmp(opt.dialect, "socketio") ? "42[\"subscribe\",{\"type\":\"subscribe\",\"id\":\"s\",\"channel\":\"room-%u\"}]"
                                                         : "{\"type\":\"subscribe\",\"id\":\"s\",\"channel\":\"room-%u\"}";
    c->state = SUBSCRIBING;
    put_frame(c, 1, text, sprintf(text, form, c->player / opt.room_size));
}

static void message_text(Conn *c, const char *text, size_t size, double t) {
    if (!strcmp(opt.dialect, "socketio") && c->kind == WS) {
        char answer[64];
        if (size && text[0] == '2') put_frame(c, 1, "3", 1);
        else if (size && text[0] == '0') put_frame(c, 1, answer, sprintf(answer, "40{\"player\":\"p%u\"}", c->player));
        if (size < 2 || text[0] != '4' || text[1] != '2') return;
    }
    if (c->state == OPENING) {
        if (!memmem(text, size, "welcome", 7)) return;
        copy_field(text, size, "\"session_id\":\"", c->session, sizeof c->session);
        copy_field(text, size, "\"position\":\"", c->position, sizeof c->position);
        if (opt.target == ROOM && c->kind == WS && !strcmp(opt.mode, "publish")) join_room(c);
        else opened(c);
        return;
    }
    if (c->state == SUBSCRIBING) {
        if (!memmem(text, size, "\"reply\"", 7)) return;
        if (!memmem(text, size, "\"ok\":true", 9)) die("no room: %.*s", (int)size, text);
        opened(c);
        return;
    }
    if (c->publisher) {
        post_answered(c, memmem(text, size, "\"ok\":true", 9) != NULL, t);
        return;
    }
    const char *at = text, *end = text + size;
    while ((at = memchr(at, '@', end - at))) {
        if (end - at < MARKER_SIZE || at[MARKER_SIZE - 1] != '@') return;
        uint32_t n = 0;
        for (int i = 1; i <= NUMBER_DIGITS; i++) n = n * 10 + (uint32_t)(at[i] - '0');
        if (!strcmp(opt.mode, "command") && !memmem(text, size, "\"ok\":true", 9)) refused++;
        arrived(c, n, t);
        return; /* one marker is all that a message has */
    }
}

static size_t head_end(const char *data, size_t size) {
    char *end = memmem(data, size, "\r\n\r\n", 4);
    return end ? (size_t)(end - data) + 4 : 0;
}

static long content_length(const char *head, size_t size) {
    for (const char *at = head; (at = memchr(at, '\n', head + size - at)); at++)
        if (head + size - at > 17 && !strncasecmp(at + 1, "content-length:", 15)) return strtol(at + 16, NULL, 10);
    return -1;
}

static size_t read_frames(Conn *c, char *data, size_t size, double t) {
    size_t at = 0;
    while (size - at >= 2) {
        unsigned char *frame = (unsigned char *)data + at;
        size_t length = frame[1] & 127, head = 2;
        if (length == 126) {
            if (size - at < 4) break;
            length = (size_t)frame[2] << 8 | frame[3], head = 4;
        } else if (length == 127) {
            if (size - at < 10) break;
            length = (size_t)frame[6] << 24 | frame[7] << 16 | frame[8] << 8 | frame[9], head = 10;
        }
        if (size - at < head + length) break;
        int opcode = frame[0] & 15;
        char *payload = data + at + head;
        at += head + length;
        if (opcode == 9) put_frame(c, 10, payload, length);
        else if (opcode == 8) {
            int code = length > 1 ? (unsigned char)payload[0] << 8 | (unsigned char)payload[1] : 0;
            if (code == BUSY && c->state < READY) { /* told to come again: as a client would */
                double began = c->began;
                retried++;
                shut(c);
                open_connection(c);
                c->began = began;
                return size;
            }
            if (c->state != CLOSING) {
                fprintf(stderr, "load: closed by the server: %d %.*s\n", code, length > 2 ? (int)length - 2 : 0, payload + 2);
                lost(c, "close frame");
            } else shut(c);
            return size;
        } else if (opcode == 1 && frame[0] & 0x80) message_text(c, payload, length, t);
        else if (opcode != 10) die("frame with opcode %d, byte %d", opcode, frame[0]);
        if (c->state == DEAD) return size;
    }
    return at;
}

/* Events end with an empty line. Frames of a chunked body lie between them and mean nothing here. */
static size_t read_events(Conn *c, char *data, size_t size, double t) {
    size_t at = 0;
    while (c->state != DEAD) {
        char *end = memmem(data + at, size - at, "\n\n", 2);
        char *wide = end ? NULL : memmem(data + at, size - at, "\n\r\n", 3); /* events with CRLF, as sse-starlette's */
        if (!end && !wide) break;
        size_t stop = end ? (size_t)(end - data) + 2 : (size_t)(wide - data) + 3;
        message_text(c, data + at, stop - at, t);
        at = stop;
    }
    return at;
}

static size_t read_answers(Conn *c, char *data, size_t size, double t) {
    size_t at = 0;
    for (;;) {
        size_t head = head_end(data + at, size - at);
        if (!head) break;
        long length = content_length(data + at, head);
        if (length < 0) die("an answer without Content-Length: %.*s", (int)head, data + at);
        if (size - at < head + (size_t)length) break;
        int status = atoi(data + at + 9);
        int good = status == 200 || status == 202;
        if (!good && refused < 3) fprintf(stderr, "load: %.*s\n", (int)(head + length), data + at);
        at += head + length;
        post_answered(c, good, t);
    }
    return at;
}

static size_t read_some(Conn *c, char *data, size_t size, double t) {
    size_t at = 0;
    if (c->state == HEAD) {
        if (!(at = head_end(data, size))) return 0;
        int status = atoi(data + 9);
        if (status != (c->kind == WS ? 101 : 200)) {
            fprintf(stderr, "load: refused: %.*s\n", (int)(size > 300 ? 300 : size), data);
            lost(c, "refused");
            return size;
        }
        if (c->publisher) opened(c);
        else c->state = OPENING;
    }
    switch (c->kind) {
    case WS: return at + read_frames(c, data + at, size - at, t);
    case SSE: return at + read_events(c, data + at, size - at, t);
    default: return at + read_answers(c, data + at, size - at, t);
    }
}

static void handle(Conn *c, uint32_t events) {
    if (c->state == DEAD) return;
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
            lost(c, strerror(error));
            return;
        }
        if (!(events & EPOLLOUT)) return;
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
        say_hello(c);
        return;
    }
    if (events & EPOLLOUT && c->out_size) flush(c);
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    size_t kept = c->in_size;
    if (kept > READ_SIZE / 2) die("a message is too long");
    if (kept) memcpy(shared, c->in, kept);
    ssize_t got = recv(c->fd, shared + kept, READ_SIZE - kept, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        if (c->state == CLOSING) shut(c);
        else lost(c, got ? strerror(errno) : "end of file");
        return;
    }
    size_t size = kept + (size_t)got;
    c->in_size = 0;
    size_t used = read_some(c, shared, size, now());
    if (c->state != DEAD && used < size) keep(&c->in, &c->in_size, &c->in_room, shared + used, size - used);
}

static void turn(double until) {
    struct epoll_event events[512];
    double wait = until - now();
    if (opt.rate && measuring && publishing && next_due - now() < wait) wait = next_due - now();
    struct timespec limit = {0};
    if (wait > 0) limit.tv_sec = (time_t)wait, limit.tv_nsec = (long)((wait - (time_t)wait) * 1e9);
    int count = epoll_pwait2(ep, events, 512, &limit, NULL);
    for (int i = 0; i < count; i++) handle(&conns[events[i].data.u32], events[i].events);
    if (opt.rate && measuring) send_due(now());
}

static void pause_for(double seconds) {
    double until = now() + seconds;
    while (now() < until) turn(until);
}

/* --- what is measured --- */

static struct { double server, user, own, wall; } before;

static void measure_from_here(void) {
    memset(buckets, 0, sizeof buckets);
    latencies = 0, delivered = 0, deliveries_wanted = 0, answered = 0;
    measured_from = published;
    measuring = 1;
    before.server = opt.pid ? cpu_of(opt.pid) : 0;
    before.user = opt.pid ? user_of(opt.pid) : 0;
    before.own = cpu_of(0);
    before.wall = last_arrival = next_due = now();
}

static void stay(void) { /* pings are answered until standard input ends */
    struct pollfd input = {.fd = 0, .events = POLLIN};
    while (poll(&input, 1, 0) == 0) turn(now() + 0.05);
}

static int report(uint64_t units, uint64_t wanted, const char *more) {
    double wall = last_arrival - before.wall;
    double own = cpu_of(0) - before.own;
    pause_for(PAUSE_SECONDS);
    measuring = publishing = 0;
    double server = opt.pid ? cpu_of(opt.pid) - before.server : 0;
    double user = opt.pid ? user_of(opt.pid) - before.user : 0;
    double per = units ? 1e6 / units : 0;
    int whole = !wrong && !duplicates && !refused && !closed_early && units == wanted;
    printf("{\"units\":%llu,\"wanted\":%llu,\"seconds\":%.6f,\"rate\":%.3f,\"server_seconds\":%.6f,\"cpu_us\":%.3f,"
           "\"user_us\":%.3f,\"load_us\":%.3f,\"load_busy\":%.4f,\"p50_ms\":%.4f,\"p99_ms\":%.4f,\"max_ms\":%.4f,"
           "\"published\":%u,\"wrong\":%u,\"duplicates\":%u,\"refused\":%u,\"closed\":%u,\"retried\":%u,\"whole\":%s%s}\n",
           (unsigned long long)units, (unsigned long long)wanted, wall, wall > 0 ? units / wall : 0, server,
           server * per, user * per, own * per, wall > 0 ? own / wall : 0, percentile(0.5), percentile(0.99), percentile(1),
           published - measured_from, wrong, duplicates, refused, closed_early, retried, whole ? "true" : "false", more);
    fflush(stdout);
    stay();
    return whole ? 0 : 1;
}

static void connect_all(void) {
    double deadline = now() + opt.timeout;
    for (int next = 0; next < conn_count || opening;) {
        while (next < conn_count && opening < opt.concurrency) open_connection(&conns[next++]);
        turn(now() + 0.05);
        if (closed_early) die("%u connections were not opened", closed_early);
        if (now() > deadline) die("%d of %d connections are not open after %.0f s", conn_count - next + opening, conn_count,
                                  opt.timeout);
    }
    pause_for(opt.settle_ms >= 0 ? opt.settle_ms / 1000.0 : SETTLE_SECONDS);
}

static void prepare(void) {
    int both = !strcmp(opt.transports, "both"), each = both ? 2 : 1;
    publishers_from = opt.players * each;
    conn_count = publishers_from + (strcmp(opt.mode, "publish") ? 0 : opt.publishers);
    conns = calloc(conn_count + 1, sizeof *conns);
    uint32_t most = opt.count + opt.warm + 64;
    for (int i = 0; i < conn_count; i++) {
        Conn *c = &conns[i];
        c->fd = -1, c->state = DEAD;
        c->publisher = i >= publishers_from;
        c->player = c->publisher ? 0 : i % opt.players;
        /* First everybody's WebSocket, then everybody's SSE: the second one finds its session. */
        c->kind = c->publisher ? (opt.publish_ws ? WS : HTTP) : both ? (i < opt.players ? WS : SSE)
                  : strcmp(opt.transports, "sse") ? WS : SSE;
        c->member = (c->player % opt.room_size) * (opt.target == ROOM) * each + (i >= opt.players && both);
        if (!strcmp(opt.mode, "resume")) most = opt.missed;
        if (!c->publisher && (opt.target == ALL || !strcmp(opt.mode, "resume"))) c->got = calloc(most / 64 + 1, 8);
    }
}

static void finish(double deadline) { /* until all that was sent is answered and delivered */
    while ((inflight || delivered < deliveries_wanted) && now() < deadline) {
        turn(now() + 0.05);
        if (wrong || duplicates) break;
    }
}

static void warm_up(void) {
    uint32_t count = opt.count;
    double rate = opt.rate, seconds = opt.seconds;
    if (!opt.warm) return;
    opt.count = opt.warm, opt.rate = 0, publishing = 1;
    send_due(now());
    finish(now() + opt.timeout);
    if (inflight) die("the warm-up was not delivered: %u of %u are under way", inflight, published);
    publishing = 0;
    opt.count = count, opt.rate = rate, opt.seconds = seconds;
    pause_for(0.2);
}

static int run_publish(void) { /* and commands */
    connect_all();
    warm_up();
    measure_from_here();
    if (opt.seconds) stop_at = now() + opt.seconds;
    publishing = 1;
    double deadline = now() + opt.seconds + opt.timeout;
    send_due(now());
    if (opt.seconds) while (now() < stop_at && !wrong && !duplicates) turn(stop_at);
    else while (published < measured_from + opt.count && now() < deadline && !wrong && !duplicates) turn(now() + 0.05);
    finish(deadline);
    pause_for(0.05); /* what comes twice may come late */
    char more[100];
    snprintf(more, sizeof more, ",\"posts\":%u,\"connections\":%d", answered, ready);
    return report(delivered, deliveries_wanted, more);
}

static int run_connect(void) {
    uint32_t next = 0, count = 0;
    double deadline;
    for (int i = 0; i < opt.players; i++) conns[i].kind = strcmp(opt.transports, "sse") ? WS : SSE;
    conn_count = opt.concurrency;
    measuring = 0;
    stop_at = 0;
    for (int measured = opt.warm ? 0 : 1; measured < 2; measured++) {
        if (measured) {
            measure_from_here();
            stop_at = now() + opt.seconds;
        }
        deadline = now() + opt.timeout + opt.seconds;
        for (int busy = 1; busy && now() < deadline;) {
            busy = 0;
            int going = measured ? now() < stop_at : next < (uint32_t)opt.warm;
            for (int i = 0; i < opt.concurrency; i++) {
                Conn *c = &conns[i];
                if (c->state == READY) {
                    last_arrival = now();
                    if (measured) latency(last_arrival - c->began), count++;
                    ready = 0;
                    if (c->kind == WS && strcmp(opt.dialect, "socketio")) c->state = CLOSING, put_frame(c, 8, "\x03\xe8", 2);
                    else shut(c);
                }
                if (c->state == DEAD && going && !closed_early) {
                    /* New players, or those of the warm-up who come again. */
                    c->player = measured && !opt.all_new && opt.warm ? next % opt.warm : next;
                    c->position[0] = c->session[0] = 0;
                    next++;
                    open_connection(c);
                }
                busy |= c->state != DEAD;
            }
            if (busy) turn(now() + 0.05);
        }
        if (!measured) pause_for(0.3);
    }
    for (int i = 0; i < opt.concurrency; i++) if (conns[i].state != DEAD) lost(&conns[i], "never opened");
    delivered = count;
    return report(count, count, "");
}

static int run_idle(void) {
    connect_all();
    printf("{\"connections\":%d}\n", ready);
    fflush(stdout);
    stay();
    return closed_early ? 1 : 0;
}

static void publish_missed(void) { /* in batches of 500, one message of each player after the other */
    Conn *c = &conns[conn_count++];
    *c = (Conn){.fd = -1, .kind = HTTP, .publisher = 1};
    open_connection(c);
    uint32_t total = (uint32_t)opt.players * opt.missed, done = 0;
    char *body = malloc(500 * (opt.size + 100));
    while (done < total) {
        double deadline = now() + opt.timeout;
        int size = 0;
        body[size++] = '[';
        for (int i = 0; i < 500 && done < total; i++, done++) {
            if (i) body[size++] = ',';
            uint32_t player = done % opt.players, number = player * opt.missed + done / opt.players;
            size += publication_json(body + size, number, PLAYER, player);
        }
        body[size++] = ']';
        while (c->state != READY && now() < deadline) turn(now() + 0.05);
        c->busy = 1;
        post(c, body, size);
        while (c->busy && c->state == READY && now() < deadline) turn(now() + 0.05);
        if (c->busy || refused) die("a batch was not stored");
    }
    free(body);
    shut(c);
}

static int run_resume(void) {
    connect_all();
    for (int i = 0; i < conn_count; i++) {
        conns[i].received = 0;
        shut(&conns[i]);
    }
    ready = 0;
    pause_for(1.0);
    publish_missed();
    conn_count--;
    pause_for(1.0);
    measure_from_here();
    double deadline = now() + opt.timeout;
    uint64_t wanted = (uint64_t)opt.players * opt.missed;
    for (int i = 0; i < conn_count; i++) open_connection(&conns[i]);
    while (delivered < wanted && now() < deadline && !wrong && !duplicates) turn(now() + 0.05);
    pause_for(0.05);
    return report(delivered, wanted, "");
}

/* --- the command line --- */

static void parse(int count, char **words) {
    if (count < 2) die("publish, command, connect, idle or resume");
    opt.mode = words[1];
    for (int i = 2; i + 1 < count; i += 2) {
        const char *name = words[i], *value = words[i + 1];
#define IS(word) !strcmp(name, "--" word)
        if (IS("port")) opt.port = atoi(value);
        else if (IS("pid")) opt.pid = atoi(value);
        else if (IS("dialect")) opt.dialect = value; /* plain, socketio */
        else if (IS("publish-over")) opt.publish_ws = !strcmp(value, "ws");
        else if (IS("transports")) opt.transports = value; /* ws, sse, both */
        else if (IS("players")) opt.players = atoi(value);
        else if (IS("target")) opt.target = !strcmp(value, "player") ? PLAYER : !strcmp(value, "room") ? ROOM : ALL;
        else if (IS("room-size")) opt.room_size = atoi(value);
        else if (IS("publishers")) opt.publishers = atoi(value);
        else if (IS("window")) opt.window = atoi(value); /* messages under way; 0: one for each publisher */
        else if (IS("rate")) opt.rate = atof(value); /* a second; 0: as many as are answered */
        else if (IS("seconds")) opt.seconds = atof(value);
        else if (IS("count")) opt.count = strtoul(value, NULL, 10);
        else if (IS("warm")) opt.warm = strtoul(value, NULL, 10);
        else if (IS("size")) opt.size = atoi(value);
        else if (IS("content")) opt.content = value;
        else if (IS("concurrency")) opt.concurrency = atoi(value);
        else if (IS("missed")) opt.missed = atoi(value);
        else if (IS("new")) opt.all_new = atoi(value);
        else if (IS("settle-ms")) opt.settle_ms = atoi(value);
        else if (IS("timeout")) opt.timeout = atof(value);
        else die("unknown option %s", name);
    }
    if (!opt.port) die("--port is needed");
    if (opt.size > 60000 || opt.size < 80) die("--size is 80 to 60000");
    if (opt.target == ROOM && (opt.room_size > GROUP_MAX || opt.players % opt.room_size)) die("--room-size does not fit");
    if (opt.target == ALL && opt.seconds && !strcmp(opt.mode, "publish")) die("to all: --count, not --seconds");
}

int main(int count, char **words) {
    struct rlimit files;
    parse(count, words);
    memset(pad, 'x', sizeof pad - 1);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    ep = epoll_create1(EPOLL_CLOEXEC);
    if (!strcmp(opt.mode, "connect") && opt.players < opt.concurrency) opt.players = opt.concurrency;
    prepare();
    if (!strcmp(opt.mode, "publish") || !strcmp(opt.mode, "command")) return run_publish();
    if (!strcmp(opt.mode, "connect")) return run_connect();
    if (!strcmp(opt.mode, "idle")) return run_idle();
    if (!strcmp(opt.mode, "resume")) return run_resume();
    die("unknown mode %s", opt.mode);
}
