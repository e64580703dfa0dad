/* Sockets that never block; see net.h. */

#include "net.h"

#include "backend.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

int64_t net_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void net_watch(int epoll, source *what, bool writing, bool added)
{
    struct epoll_event event = {EPOLLIN | (writing ? EPOLLOUT : 0), {.ptr = what}};
    epoll_ctl(epoll, added ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, what->fd, &event);
}

/* A forked child may hold the same socket: closing it here alone would neither take it out of epoll nor tell the peer. */
void net_drop(int epoll, source *what)
{
    if (what->fd < 0)
        return;
    epoll_ctl(epoll, EPOLL_CTL_DEL, what->fd, NULL);
    shutdown(what->fd, SHUT_RDWR);
    close(what->fd);
    what->fd = -1;
}

/* A peer whose host vanished sends no FIN: the kernel gives up on it. */
void net_tune(int fd)
{
    int one = 1, idle = 15, interval = 5, probes = 3, patience = NET_PATIENCE_MS;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience, sizeof patience);
}

void net_ring(int bell)
{
    uint64_t one = 1;
    while (write(bell, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void net_rung(int bell)
{
    uint64_t count;
    while (read(bell, &count, sizeof count) < 0 && errno == EINTR)
        ;
}

bool net_valid(const net_address *where)
{
    return (where->family == 4 || where->family == 6) && where->port;
}

int net_connect(const net_address *where)
{
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(where->port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(where->port)};
    memcpy(&v4.sin_addr, where->address, 4);
    memcpy(&v6.sin6_addr, where->address, 16);
    bool old = where->family == 4;
    int fd = socket(old ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    net_tune(fd);
    const struct sockaddr *address = old ? (struct sockaddr *)&v4 : (struct sockaddr *)&v6;
    if (!connect(fd, address, old ? sizeof v4 : sizeof v6) || errno == EINPROGRESS)
        return fd;
    int error = errno;
    close(fd);
    return -error;
}

static int parse_address(const char *text, int port, struct sockaddr_storage *out, net_address *where)
{
    struct sockaddr_in *v4 = (struct sockaddr_in *)out;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;
    memset(out, 0, sizeof *out);
    where->family = inet_pton(AF_INET, text, &v4->sin_addr) == 1 ? 4 : 6;
    if (where->family == 4) {
        v4->sin_family = AF_INET, v4->sin_port = htons((uint16_t)port);
        memcpy(where->address, &v4->sin_addr, 4);
        return 0;
    }
    if (inet_pton(AF_INET6, text, &v6->sin6_addr) != 1)
        return pd_fail(EINVAL, "%s is not an address", text);
    v6->sin6_family = AF_INET6, v6->sin6_port = htons((uint16_t)port);
    memcpy(where->address, &v6->sin6_addr, 16);
    return 0;
}

int net_listen(const pd_options *options, net_address *where)
{
    struct sockaddr_storage address, ignored;
    int error = parse_address(options->host, options->port, &address, where), one = 1;
    socklen_t size = where->family == 4 ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    if (error)
        return error;
    int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0)
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) || listen(fd, 128) ||
        getsockname(fd, (struct sockaddr *)&address, &size)) {
        error = pd_fail(errno, "cannot listen at %s port %d: %s; choose another 'host' or 'port' (0 picks a free port)",
                        options->host, options->port, strerror(errno));
    } else {
        where->port = ntohs(where->family == 4 ? ((struct sockaddr_in *)&address)->sin_port
                                               : ((struct sockaddr_in6 *)&address)->sin6_port);
        error = parse_address(options->advertise, 0, &ignored, where);
    }
    if (error && fd >= 0)
        close(fd);
    return error ? error : fd;
}

int net_spare(void)
{
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

int net_accept(int listener, int *spare)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0 && (errno == EMFILE || errno == ENFILE) && *spare >= 0) {
        /* Else it would wait there for ever, and the loop would spin. */
        close(*spare);
        int unserved = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (unserved >= 0)
            close(unserved);
        *spare = net_spare();
    }
    return fd;
}

bool net_send(int fd, const unsigned char *out, size_t bytes, size_t *at)
{
    while (*at < bytes) {
        ssize_t sent = send(fd, out + *at, bytes - *at, MSG_NOSIGNAL);
        if (sent >= 0)
            *at += (size_t)sent;
        else if (errno != EINTR)
            return errno == EAGAIN;
    }
    return true;
}
