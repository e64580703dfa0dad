/* How ranks find one another: all tell the root where they listen, and it tells all of them about all. See hccl.h. */

#include "hccl.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAGIC 0x4C434348u

typedef struct {
    uint32_t magic, ip;
    uint16_t port;
} root;

typedef struct {
    uint32_t magic, rank, ranks, ip;
    uint16_t port, unused;
} member;

typedef struct {
    int listener;
    int64_t deadline;
    uint32_t ranks; /* 0 until the first member says */
    int fds[MAX_RANKS];
    member members[MAX_RANKS];
} meeting;

int64_t hccl_seconds(const char *variable, int64_t otherwise)
{
    const char *text = getenv(variable);
    int64_t seconds = text ? strtol(text, NULL, 10) : 0;
    return seconds > 0 ? seconds : otherwise;
}

static uint32_t own_ip(void)
{
    const char *text = getenv("HCCL_IF_IP");
    struct in_addr parsed;
    return text && inet_pton(AF_INET, text, &parsed) == 1 ? parsed.s_addr : htonl(INADDR_LOOPBACK);
}

static int listen_somewhere(uint16_t *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = own_ip()};
    socklen_t length = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    if (bind(fd, (struct sockaddr *)&address, length) || listen(fd, 2 * MAX_RANKS) ||
        getsockname(fd, (struct sockaddr *)&address, &length)) {
        close(fd);
        return -1;
    }
    *port = address.sin_port;
    return fd;
}

static int dial(uint32_t ip, uint16_t port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = ip};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!connect(fd, (struct sockaddr *)&address, sizeof address))
        return fd;
    close(fd);
    return -1;
}

static int accept_until(int listener, int64_t deadline)
{
    int one = 1;
    if (emu_wait(listener, POLLIN, deadline))
        return -1;
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

/* A member that gave up has hung up; its place is free again. */
static uint32_t count_present(meeting *self)
{
    uint32_t present = 0;
    for (uint32_t i = 0; i < MAX_RANKS; i++) {
        struct pollfd poller = {self->fds[i], POLLRDHUP, 0};
        if (self->fds[i] >= 0 && poll(&poller, 1, 0)) {
            close(self->fds[i]);
            self->fds[i] = -1;
        }
        present += self->fds[i] >= 0;
    }
    return present;
}

/* True where the newcomer fits those who are there. */
static bool admit(meeting *self, int fd)
{
    member who;
    if (emu_receive(fd, &who, sizeof who, emu_deadline(1000)) || who.magic != MAGIC || who.rank >= MAX_RANKS)
        return false;
    if (!count_present(self))
        self->ranks = who.ranks;
    if (who.ranks != self->ranks || self->fds[who.rank] >= 0)
        return false;
    self->fds[who.rank] = fd;
    self->members[who.rank] = who;
    return true;
}

static void *meet(void *argument)
{
    meeting *self = argument;
    bool complete = false;
    while (!complete) {
        int fd = accept_until(self->listener, self->deadline);
        if (fd < 0)
            break;
        if (!admit(self, fd))
            close(fd);
        complete = self->ranks && count_present(self) == self->ranks;
    }
    for (uint32_t i = 0; i < MAX_RANKS; i++) {
        if (self->fds[i] < 0)
            continue;
        if (complete)
            emu_send(self->fds[i], self->members, self->ranks * sizeof *self->members, emu_deadline(1000));
        close(self->fds[i]);
    }
    close(self->listener);
    free(self);
    return NULL;
}

/* Twice the patience of a rank: those who come late find out that they are, and the thread ends. */
int hccl_open_root(HcclRootInfo *info)
{
    meeting *made = malloc(sizeof *made);
    root address = {MAGIC, own_ip(), 0};
    pthread_t thread;
    if (!made)
        return HCCL_INTERNAL;
    memset(made, 0, sizeof *made);
    memset(made->fds, -1, sizeof made->fds);
    made->deadline = emu_deadline(2000 * hccl_seconds("HCCL_CONNECT_TIMEOUT", 120));
    made->listener = listen_somewhere(&address.port);
    if (made->listener < 0 || pthread_create(&thread, NULL, meet, made)) {
        if (made->listener >= 0)
            close(made->listener);
        free(made);
        return HCCL_TCP_CONNECT;
    }
    pthread_detach(thread);
    memset(info, 0, sizeof *info);
    memcpy(info->internal, &address, sizeof address);
    return HCCL_OK;
}

static int register_at_root(comm *self, const HcclRootInfo *info, uint16_t port, member *members, int64_t deadline)
{
    member me = {MAGIC, self->rank, self->ranks, own_ip(), port, 0};
    root address;
    memcpy(&address, info->internal, sizeof address);
    if (address.magic != MAGIC)
        return HCCL_PARA;
    int fd = dial(address.ip, address.port);
    if (fd < 0)
        return HCCL_TCP_CONNECT;
    bool told = !emu_send(fd, &me, sizeof me, deadline) &&
                !emu_receive(fd, members, self->ranks * sizeof *members, deadline);
    int reason = errno;
    close(fd);
    if (told)
        return HCCL_OK;
    return reason == ETIMEDOUT ? HCCL_TIMEOUT : HCCL_TCP_CONNECT;
}

/* All listen by now, so that nobody waits for a connection to be accepted. */
static int connect_all(comm *self, int listener, const member *members, int64_t deadline)
{
    for (uint32_t i = 0; i < self->ranks; i++) {
        if (i == self->rank)
            continue;
        self->to[i].fd = dial(members[i].ip, members[i].port);
        if (self->to[i].fd < 0 || emu_send(self->to[i].fd, &self->rank, sizeof self->rank, deadline))
            return HCCL_TCP_CONNECT;
    }
    for (uint32_t i = 1; i < self->ranks; i++) {
        uint32_t rank = 0;
        int fd = accept_until(listener, deadline);
        if (fd < 0)
            return HCCL_TIMEOUT;
        if (emu_receive(fd, &rank, sizeof rank, deadline) || rank >= self->ranks || self->from[rank].fd >= 0) {
            close(fd);
            return HCCL_TCP_CONNECT;
        }
        self->from[rank].fd = fd;
    }
    return HCCL_OK;
}

int hccl_gather(comm *self, const HcclRootInfo *info, int64_t deadline)
{
    member members[MAX_RANKS];
    uint16_t port = 0;
    int listener = listen_somewhere(&port);
    if (listener < 0)
        return HCCL_TCP_CONNECT;
    int status = register_at_root(self, info, port, members, deadline);
    if (!status)
        status = connect_all(self, listener, members, deadline);
    close(listener);
    return status;
}
