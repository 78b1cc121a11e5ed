/*
 * The floor: what the kernel alone costs. It trusts its input, parses no JSON, stores nothing and does not care about
 * slow clients; one send() for each message and connection, and one for each answer.
 *
 * `raw PORT lose` loses one delivery and `raw PORT twice` makes one twice, so that it can be seen that the load
 * generator notices.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 70000
#define ROOMS 4096

typedef enum { NEW, WS, SSE } Kind;
typedef struct Conn {
    int fd;
    Kind kind;
    int player, room;
    char *in;
    size_t size;
    struct Conn *next, *next_in_room; /* of the same player; in the same room */
} Conn;

static Conn *everyone[MOST], *players[1 << 20], *rooms[ROOMS];
static int everyone_count, deliveries, lose_one, one_twice;

static void send_to(Conn *c, const char *frame, size_t frame_size, const char *event, size_t event_size) {
    if (++deliveries == 100) {
        if (lose_one) return;
        if (one_twice) send_to(c, frame, frame_size, event, event_size);
    }
    if (c->kind == WS) send(c->fd, frame, frame_size, MSG_NOSIGNAL | MSG_DONTWAIT);
    else send(c->fd, event, event_size, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static size_t make_frame(char *frame, const char *text, size_t size) {
    size_t at = 0;
    frame[at++] = (char)0x81;
    if (size < 126) frame[at++] = (char)size;
    else frame[at++] = 126, frame[at++] = (char)(size >> 8), frame[at++] = (char)size;
    memcpy(frame + at, text, size);
    return at + size;
}

static void publish(const char *body, size_t size) {
    static char frame[70000], event[70000];
    const char *message = memmem(body, size, "\"message\":", 10), *to;
    if (!message) return;
    message += 10;
    size_t length = (size_t)(body + size - 1 - message);
    size_t frame_size = make_frame(frame, message, length);
    size_t event_size = (size_t)sprintf(event, "data: %.*s\n\n", (int)length, message);
    if ((to = memmem(body, size, "\"player_id\":\"p", 14)))
        for (Conn *c = players[atoi(to + 14)]; c; c = c->next) send_to(c, frame, frame_size, event, event_size);
    else if ((to = memmem(body, size, "\"channel\":\"room-", 16)))
        for (Conn *c = rooms[atoi(to + 16) % ROOMS]; c; c = c->next_in_room) send_to(c, frame, frame_size, event, event_size);
    else
        for (int i = 0; i < everyone_count; i++) send_to(everyone[i], frame, frame_size, event, event_size);
}

static void leave(Conn *c) {
    if (c->kind != NEW) {
        for (int i = 0; i < everyone_count; i++)
            if (everyone[i] == c) everyone[i] = everyone[--everyone_count];
        Conn **at = &players[c->player];
        while (*at != c) at = &(*at)->next;
        *at = c->next;
        if (c->room >= 0) {
            for (at = &rooms[c->room]; *at != c;) at = &(*at)->next_in_room;
            *at = c->next_in_room;
        }
    }
    close(c->fd);
    c->fd = -1; /* freed by the caller */
}

static void join(Conn *c, Kind kind, const char *path) {
    char all[600];
    const char *welcome = "{\"type\":\"welcome\"}";
    c->kind = kind;
    c->player = atoi(path);
    c->next = players[c->player];
    players[c->player] = c;
    everyone[everyone_count++] = c;
    size_t at = (size_t)sprintf(all, kind == WS
        ? "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
          "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
        : "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n");
    if (kind == WS) at += make_frame(all + at, welcome, strlen(welcome));
    else at += (size_t)sprintf(all + at, "data: %s\n\n", welcome);
    send(c->fd, all, at, MSG_NOSIGNAL);
}

static size_t hear_http(Conn *c, char *data, size_t size) {
    char *end = memmem(data, size, "\r\n\r\n", 4);
    if (!end) return 0;
    size_t head = (size_t)(end - data) + 4;
    if (!memcmp(data, "GET /ws/p", 9)) join(c, WS, data + 9);
    else if (!memcmp(data, "GET /sse/p", 10)) join(c, SSE, data + 10);
    else if (!memcmp(data, "POST", 4)) {
        char *length = memmem(data, head, "Content-Length: ", 16);
        size_t body = length ? strtoul(length + 16, NULL, 10) : 0;
        if (size < head + body) return 0;
        publish(data + head, body);
        const char *answer = "HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{\"ok\":true}";
        send(c->fd, answer, strlen(answer), MSG_NOSIGNAL);
        return head + body;
    } else {
        const char *answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        send(c->fd, answer, strlen(answer), MSG_NOSIGNAL);
    }
    return head;
}

static size_t hear_frame(Conn *c, char *data, size_t size) {
    if (size < 6) return 0;
    size_t length = data[1] & 127, head = 6;
    if (length == 126) length = (size_t)(unsigned char)data[2] << 8 | (unsigned char)data[3], head = 8;
    if (size < head + length) return 0;
    char *mask = data + head - 4, *text = data + head, answer[70000], frame[70010];
    for (size_t i = 0; i < length; i++) text[i] ^= mask[i & 3];
    if ((data[0] & 15) == 8) {
        send(c->fd, "\x88\x02\x03\xe8", 4, MSG_NOSIGNAL);
        leave(c);
        return head + length;
    }
    char *id = memmem(text, length, "\"id\":\"", 6), *content = memmem(text, length, "\"content\":", 10);
    char *room = memmem(text, length, "\"channel\":\"room-", 16);
    if (room) {
        c->room = atoi(room + 16) % ROOMS;
        c->next_in_room = rooms[c->room];
        rooms[c->room] = c;
    }
    size_t id_size = id ? (size_t)((char *)memchr(id + 6, '"', text + length - id - 6) - id) + 1 : 0;
    size_t at = (size_t)sprintf(answer, "{\"type\":\"reply\",%.*s,\"ok\":true,%.*s", (int)id_size, id ? id : "",
                                content ? (int)(text + length - content) : 10, content ? content : "\"is\":\"in\"}");
    send(c->fd, frame, make_frame(frame, answer, at), MSG_NOSIGNAL);
    return head + length;
}

int main(int count, char **words) {
    struct rlimit files;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), ep = epoll_create1(0), on = 1;
    static char data[1 << 20];
    lose_one = count > 2 && !strcmp(words[2], "lose");
    one_twice = count > 2 && !strcmp(words[2], "twice");
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    address.sin_port = htons(count > 1 ? (unsigned short)atoi(words[1]) : 8000);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) return perror("listen"), 1;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[512];
    epoll_ctl(ep, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int some = epoll_wait(ep, events, 512, -1);
        for (int i = 0; i < some; i++) {
            Conn *c = events[i].data.ptr;
            if (!c) {
                for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
                    if (!(c = calloc(1, sizeof *c))) return 1;
                    c->fd = fd, c->room = -1;
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    event.data.ptr = c;
                    epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event);
                }
                continue;
            }
            if (c->size) memcpy(data, c->in, c->size);
            ssize_t got = recv(c->fd, data + c->size, sizeof data - c->size, 0);
            if (got < 0 && errno == EAGAIN) continue;
            if (got <= 0) leave(c);
            size_t size = c->size + (got > 0 ? (size_t)got : 0), at = 0, used = 1;
            while (c->fd >= 0 && c->kind != SSE && at < size && used)
                at += used = c->kind == WS ? hear_frame(c, data + at, size - at) : hear_http(c, data + at, size - at);
            if (c->fd < 0) {
                free(c->in);
                free(c);
                continue;
            }
            c->size = c->kind == SSE ? 0 : size - at;
            if (c->size && (c->in = realloc(c->in, c->size))) memcpy(c->in, data + at, c->size);
        }
    }
}
