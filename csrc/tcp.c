/* The loops of the tcp backend; see tcp.h. */

#include "tcp.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

const char tcp_magic[8] = "PDTCP01";

static void rung(source *self, uint32_t events)
{
    (void)events;
    net_rung(self->fd);
}

void tcp_wake(void *own)
{
    tcp *all = own;
    for (int i = 0; i < all->num_loops; i++)
        net_ring(all->loops[i].bell.fd);
}

static void *run_loop(void *argument)
{
    loop *each = argument;
    pd_pin(each->tcp->options, (int)(each - each->tcp->loops));
    struct epoll_event events[64];
    while (!atomic_load(&each->tcp->stop)) {
        int64_t first = lanes_deadline(each), second = connections_deadline(each), now = net_now_ms();
        int64_t deadline = first < second ? first : second;
        int timeout = deadline == INT64_MAX ? -1 : deadline <= now ? 0 : (int)(deadline - now) + 1;
        int count = epoll_wait(each->epoll, events, 64, timeout);
        bool woken = false;
        for (int i = 0; i < count; i++) {
            source *from = events[i].data.ptr;
            woken |= from == &each->bell;
            from->ready(from, events[i].events);
        }
        lanes_turn(each, woken);
        connections_turn(each);
    }
    return NULL;
}

static int start_loop(tcp *all, loop *each)
{
    each->tcp = all;
    each->bell = (source){rung, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    each->epoll = epoll_create1(EPOLL_CLOEXEC);
    pthread_mutex_init(&each->lock, NULL);
    if (each->bell.fd < 0 || each->epoll < 0)
        return pd_fail(errno, "cannot make a loop: %s", strerror(errno));
    net_watch(each->epoll, &each->bell, false, false);
    return 0;
}

static void tcp_stop(void *own)
{
    tcp *all = own;
    atomic_store(&all->stop, true);
    tcp_wake(all);
    for (int i = 0; i < all->num_loops; i++) {
        loop *each = &all->loops[i];
        if (each->running)
            pthread_join(each->thread, NULL);
        each->running = false;
        lanes_close(each);
        connections_close(each);
    }
}

static void tcp_close(void *own)
{
    tcp *all = own;
    tcp_stop(all);
    for (int i = 0; i < all->num_loops; i++) {
        close(all->loops[i].bell.fd);
        close(all->loops[i].epoll);
        pthread_mutex_destroy(&all->loops[i].lock);
    }
    if (all->listener.fd >= 0) {
        shutdown(all->listener.fd, SHUT_RDWR); /* also for a forked child, which would let readers wait for ever */
        close(all->listener.fd);
    }
    if (all->spare >= 0)
        close(all->spare);
    grants_close(&all->grants);
    free(all->loops);
    free(all);
}

static void *tcp_open(pd_transport *core, const pd_options *options)
{
    tcp *all = calloc(1, sizeof *all);
    if (!all)
        return pd_fail(ENOMEM, "no memory"), NULL;
    all->core = core;
    all->listener.fd = -1;
    all->spare = net_spare();
    all->options = options;
    grants_open(&all->grants);
    int wanted = options->threads < TCP_LOOPS ? options->threads : TCP_LOOPS, error = 0;
    all->loops = calloc((size_t)wanted, sizeof *all->loops);
    if (!all->loops || getrandom(all->instance, TCP_INSTANCE, 0) != TCP_INSTANCE)
        error = pd_fail(ENOMEM, "no memory");
    for (; !error && all->num_loops < wanted; all->num_loops += 1)
        error = start_loop(all, &all->loops[all->num_loops]);
    if (!error)
        error = tcp_listen(all, options);
    for (int i = 0; !error && i < all->num_loops; i++) {
        error = pd_start(&all->loops[i].thread, run_loop, &all->loops[i]);
        all->loops[i].running = !error;
        if (error)
            pd_fail(error, "cannot start a thread: %s", strerror(error));
    }
    if (error) {
        tcp_close(all);
        return NULL;
    }
    return all;
}

static int tcp_publish(void *own, pd_memory *memory)
{
    grants_publish(&((tcp *)own)->grants, memory);
    return 0;
}

static int tcp_grant(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    return grants_put(&((tcp *)own)->grants, lease, blocks, num_groups);
}

static void tcp_revoke(void *own, uint64_t number, uint64_t epoch)
{
    grants_revoke(&((tcp *)own)->grants, number, epoch);
}

static int tcp_describe(void *own, unsigned char *out, size_t room)
{
    tcp *all = own;
    if (room < sizeof all->where)
        return pd_fail(ENOSPC, "no room");
    memcpy(out, &all->where, sizeof all->where);
    return sizeof all->where;
}

const pd_backend pd_tcp = {
    .name = "tcp",
    .open = tcp_open,
    .stop = tcp_stop,
    .close = tcp_close,
    .describe = tcp_describe,
    .publish = tcp_publish,
    .grant = tcp_grant,
    .revoke = tcp_revoke,
    .can_reach = tcp_can_reach,
    .dial = tcp_dial,
    .disconnect = tcp_disconnect,
    .wake = tcp_wake,
};
