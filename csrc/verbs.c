/* The verbs backend's loop and its calls; see verbs.h. */

#include "verbs.h"

#include "core.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

const char verbs_magic[8] = "PDVRB01";

static void rung(source *self, uint32_t events)
{
    (void)events;
    net_rung(self->fd);
}

static void verbs_wake(void *own)
{
    net_ring(((verbs *)own)->bell.fd);
}

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Look for completions for as long as is configured, if any can come; true: there were some. */
static bool spin(verbs *all)
{
    bool waiting = false;
    for (int i = 0; i < all->num_rails && !waiting; i++)
        for (const queue *each = all->rails[i].queues; each && !waiting; each = each->next)
            waiting = each->count;
    for (int64_t end = now_us() + all->settings.poll_us; waiting && now_us() < end;)
        if (rails_look(all))
            return true;
    return false;
}

static void *run_loop(void *argument)
{
    verbs *all = argument;
    pd_pin(all->options, 0);
    struct epoll_event events[64];
    while (!atomic_load(&all->stop)) {
        int64_t first = peers_deadline(all), second = served_deadline(all), now = net_now_ms();
        int64_t deadline = first < second ? first : second;
        int timeout = deadline == INT64_MAX ? -1 : deadline <= now ? 0 : deadline - now > 60000 ? 60000 : (int)(deadline - now) + 1;
        if (all->settings.poll_us && spin(all))
            timeout = 0;
        int count = epoll_wait(all->epoll, events, 64, timeout);
        bool woken = false;
        for (int i = 0; i < count; i++) {
            source *from = events[i].data.ptr;
            woken |= from == &all->bell;
            from->ready(from, events[i].events);
        }
        peers_turn(all, woken);
        served_turn(all);
    }
    return NULL;
}

static void verbs_stop(void *own)
{
    verbs *all = own;
    atomic_store(&all->stop, true);
    if (all->bell.fd >= 0)
        verbs_wake(all);
    if (all->running)
        pthread_join(all->thread, NULL);
    all->running = false;
    joiner_stop(all);
    peers_close(all);
    served_close(all);
}

static void verbs_close(void *own)
{
    verbs *all = own;
    verbs_stop(all);
    if (all->listener.fd >= 0) {
        shutdown(all->listener.fd, SHUT_RDWR); /* also for a forked child, which would let readers wait for ever */
        close(all->listener.fd);
    }
    flights_free(all);
    buffers_free(all);
    keys_release(all->keys);
    rails_close(all);
    gpu_close(all);
    for (int i = 0, fds[] = {all->bell.fd, all->epoll, all->spare}; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    grants_close(&all->leases);
    pthread_cond_destroy(&all->to_join);
    pthread_mutex_destroy(&all->lock);
    free(all);
}

static int publish(verbs *all, pd_memory *memory)
{
    keys *made = gpu_publish(all, memory) ? NULL : keys_make(all, memory);
    if (!made)
        return -EIO; /* the old ones stand */
    pthread_mutex_lock(&all->lock);
    keys *old = all->keys;
    all->keys = made;
    all->generation++;
    pthread_mutex_unlock(&all->lock);
    keys_release(old);
    return 0;
}

static int start(verbs *all)
{
    int error = rails_open(all);
    pd_memory *none = error ? NULL : memory_make(NULL, 0, NULL, 0);
    if (!error)
        error = none ? publish(all, none) : pd_fail(ENOMEM, "no memory");
    pd_release(none);
    if (!error)
        error = verbs_listen(all);
    if (error)
        return error;
    error = joiner_start(all);
    if (error)
        return error;
    error = pd_start(&all->thread, run_loop, all);
    all->running = !error;
    return error ? pd_fail(error, "cannot start a thread: %s", strerror(error)) : 0;
}

static void *verbs_open(pd_transport *core, const pd_options *options)
{
    verbs *all = calloc(1, sizeof *all);
    if (!all || options->settings_bytes != sizeof all->settings) {
        free(all);
        return pd_fail(EINVAL, "settings of another version"), NULL;
    }
    memcpy(&all->settings, options->settings, sizeof all->settings);
    memcpy(all->where.magic, verbs_magic, sizeof all->where.magic);
    all->core = core;
    all->options = options;
    all->listener.fd = -1;
    all->spare = net_spare();
    grants_open(&all->leases);
    pthread_mutex_init(&all->lock, NULL);
    pthread_cond_init(&all->to_join, NULL);
    all->epoll = epoll_create1(EPOLL_CLOEXEC);
    all->bell = (source){rung, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    bool fine = all->epoll >= 0 && all->bell.fd >= 0 &&
                getrandom(all->where.instance, VERBS_INSTANCE, 0) == VERBS_INSTANCE;
    if (!fine)
        pd_fail(errno, "cannot make a loop: %s", strerror(errno));
    else
        net_watch(all->epoll, &all->bell, false, false);
    if (!fine || start(all)) {
        verbs_close(all);
        return NULL;
    }
    return all;
}

static int verbs_describe(void *own, unsigned char *out, size_t room)
{
    verbs *all = own;
    if (room < sizeof all->where)
        return pd_fail(ENOSPC, "no room");
    memcpy(out, &all->where, sizeof all->where);
    return sizeof all->where;
}

static int verbs_publish(void *own, pd_memory *memory)
{
    int error = publish(own, memory);
    if (!error)
        verbs_wake(own);
    return error;
}

static int verbs_grant(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    return grants_put(&((verbs *)own)->leases, lease, blocks, num_groups);
}

static void verbs_revoke(void *own, uint64_t number, uint64_t epoch)
{
    grants_revoke(&((verbs *)own)->leases, number, epoch);
}

static int verbs_counters(void *own, pd_counter *out, int room)
{
    verbs_counts *counts = &((verbs *)own)->counts;
    struct {
        const char *name;
        _Atomic uint64_t *value;
    } all[] = {
        {"requests", &counts->requests}, {"batches", &counts->batches},     {"bytes", &counts->bytes},
        {"asks", &counts->asks},         {"writes", &counts->writes},       {"lanes_opened", &counts->lanes},
        {"lanes_lost", &counts->broken}, {"on_demand", &counts->on_demand}, {"dma_bufs", &counts->dma_bufs},
    };
    int count = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all && count < room; i++, count++) {
        snprintf(out[count].name, sizeof out[count].name, "%s", all[i].name);
        out[count].value = atomic_load(all[i].value);
    }
    return count;
}

const pd_backend pd_verbs = {
    .name = "verbs",
    .probe = verbs_probe,
    .open = verbs_open,
    .stop = verbs_stop,
    .close = verbs_close,
    .describe = verbs_describe,
    .counters = verbs_counters,
    .publish = verbs_publish,
    .grant = verbs_grant,
    .revoke = verbs_revoke,
    .can_reach = verbs_can_reach,
    .buffer = buffer_make,
    .place = verbs_place,
    .dial = verbs_dial,
    .disconnect = verbs_disconnect,
    .wake = verbs_wake,
};
