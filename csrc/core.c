/* The interface of pd.h over any backend; see core.h for how it works. */

#include "core.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "net.h"

static const pd_backend *const backends[] = {&pd_shm, &pd_tcp, &pd_verbs, &pd_hixl, &pd_hccl, &pd_cuda_ipc};

static _Thread_local char last_error[PD_MAX_WORDS];

const char *pd_last_error(void)
{
    return last_error;
}

int pd_fail(int error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return -error;
}

/* --- the interface ------------------------------------------------------------------------------------------------ */

static const pd_backend *find(const char *name)
{
    for (size_t i = 0; i < sizeof backends / sizeof *backends; i++)
        if (!strcmp(backends[i]->name, name))
            return backends[i];
    return pd_fail(ENOENT, "there is no backend %s", name), NULL;
}

int pd_probe(const char *name)
{
    const pd_backend *found = find(name);
    return !found ? -ENOENT : found->probe ? found->probe() : 0;
}

int pd_open(const char *backend, const pd_options *options, pd_transport **out)
{
    const pd_backend *found = find(backend);
    if (!found)
        return -ENOENT;
    pd_transport *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory");
    made->backend = found;
    made->options = *options;
    made->options.threads = options->threads < 1 ? 1 : options->threads > MAX_THREADS ? MAX_THREADS : options->threads;
    made->cpus = duplicate(options->cpus, options->num_cpus, sizeof *options->cpus);
    made->options.cpus = made->cpus;
    made->memory = memory_make(NULL, 0, NULL, 0);
    made->done_tail = &made->done;
    made->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&made->lock, NULL);
    pthread_mutex_init(&made->owner_lock, NULL);
    pthread_cond_init(&made->work, NULL);
    if (!made->cpus || !made->memory || made->bell < 0)
        pd_fail(errno ? errno : ENOMEM, "cannot open %s: %s", backend, strerror(errno));
    else
        made->own = made->backend->open(made, &made->options);
    if (!made->own) {
        pd_close(made);
        return -EIO;
    }
    *out = made;
    return 0;
}

int pd_close(pd_transport *transport)
{
    pthread_mutex_lock(&transport->lock);
    transport->stop = true;
    transport->stopped = net_now_ms();
    pthread_cond_broadcast(&transport->work);
    pthread_mutex_unlock(&transport->lock);
    for (int i = 0; i < transport->running; i++)
        pthread_join(transport->threads[i], NULL);
    if (transport->own && transport->backend->stop)
        transport->backend->stop(transport->own);
    pthread_mutex_lock(&transport->lock); /* nothing copies any more, so every read is quiet once it ended */
    for (size_t i = 0; i < transport->tags.room; i++) {
        op *each = transport->tags.entries[i].value;
        if (each && each->kind == READ && !each->over)
            end(transport, each, PD_CANCELLED, "closed");
        else if (each && each->kind == CONNECT && !each->over)
            peer_release(transport, each->peer);
    }
    for (size_t i = 0; i < transport->peers.room; i++)
        if (transport->peers.entries[i].value)
            peer_release(transport, transport->peers.entries[i].value);
    for (size_t i = 0; i < transport->tags.room; i++)
        if (transport->tags.entries[i].value)
            op_free(transport->tags.entries[i].value);
    pthread_mutex_unlock(&transport->lock);
    for (pd_taken *each = transport->unused, *next; each; each = next) {
        next = each->next;
        if (!transport->backend->buffer)
            free(each->buffer);
        free(each);
    }
    free(transport->tags.entries);
    free(transport->peers.entries);
    if (transport->own)
        transport->backend->close(transport->own);
    if (transport->memory)
        pd_release(transport->memory);
    if (transport->bell >= 0)
        close(transport->bell);
    free(transport->cpus);
    pthread_mutex_destroy(&transport->lock);
    pthread_mutex_destroy(&transport->owner_lock);
    pthread_cond_destroy(&transport->work);
    int abandoned = atomic_load(&transport->abandoned);
    free(transport);
    return abandoned;
}

int pd_fileno(const pd_transport *transport)
{
    return transport->bell;
}

int pd_describe(pd_transport *transport, unsigned char *out, size_t room)
{
    return transport->backend->describe(transport->own, out, room);
}

int pd_counters(pd_transport *transport, pd_counter *out, int room)
{
    return transport->backend->counters ? transport->backend->counters(transport->own, out, room) : 0;
}

int pd_can_reach(pd_transport *transport, const unsigned char *remote, size_t bytes)
{
    return transport->backend->can_reach(transport->own, remote, bytes);
}

int pd_register(pd_transport *transport, const pd_region *regions, size_t num_regions, const pd_grid *grids,
                size_t num_grids)
{
    int error = check_grids(regions, num_regions, grids, num_grids);
    if (error)
        return error;
    pd_memory *made = memory_make(regions, num_regions, grids, num_grids);
    if (!made)
        return pd_fail(ENOMEM, "no memory for %zu grids", num_grids);
    pthread_mutex_lock(&transport->owner_lock);
    error = transport->backend->publish(transport->own, made);
    pthread_mutex_lock(&transport->lock);
    pd_memory *old = error ? made : transport->memory;
    if (!error)
        transport->memory = made;
    pd_release(old);
    pthread_mutex_unlock(&transport->lock);
    pthread_mutex_unlock(&transport->owner_lock);
    return error;
}

int pd_grant(pd_transport *transport, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    if (lease->capability_bytes > PD_MAX_CAPABILITY)
        return pd_fail(EINVAL, "a capability has at most %d bytes", PD_MAX_CAPABILITY);
    pthread_mutex_lock(&transport->owner_lock);
    int error = transport->backend->grant(transport->own, lease, blocks, num_groups);
    pthread_mutex_unlock(&transport->owner_lock);
    return error;
}

int pd_revoke(pd_transport *transport, uint64_t number, uint64_t epoch)
{
    pthread_mutex_lock(&transport->owner_lock);
    transport->backend->revoke(transport->own, number, epoch);
    pthread_mutex_unlock(&transport->owner_lock);
    return 0;
}

int pd_connect(pd_transport *transport, uint64_t number, const char *name, const unsigned char *remote, size_t bytes,
               uint64_t tag)
{
    int error = 0;
    pthread_mutex_lock(&transport->lock);
    peer *made = calloc(1, sizeof *made);
    op *each = made ? op_open(transport, CONNECT, tag) : NULL;
    if (each) {
        each->remote = duplicate(remote, bytes, 1);
        each->remote_bytes = bytes;
        *made = (peer){.number = number, .refs = 2};
        snprintf(made->name, sizeof made->name, "%s", name);
    }
    bool dials = transport->backend->dial;
    if (!each || !each->remote || (!dials && start_threads(transport)) || !pd_table_put(&transport->peers, number, made)) {
        error = made && !each ? -EINVAL : pd_fail(ENOMEM, "cannot connect: no memory or no thread");
        if (each)
            op_free(pd_table_remove(&transport->tags, tag));
        free(made);
    } else {
        each->peer = made;
        if (!dials) {
            enqueue(transport, each);
        } else {
            made->dialling = each;
            made->own = transport->backend->dial(transport->own, number, remote, bytes);
            if (!made->own)
                dialled(transport, made, PD_PEER_LOST, pd_last_error());
        }
    }
    pthread_mutex_unlock(&transport->lock);
    return error;
}

int pd_disconnect(pd_transport *transport, uint64_t number)
{
    pthread_mutex_lock(&transport->lock);
    peer *owner = pd_table_remove(&transport->peers, number);
    if (owner) {
        end_all(transport, owner, PD_CANCELLED, "disconnected");
        dialled(transport, owner, PD_CANCELLED, "disconnected");
        peer_release(transport, owner);
    }
    pthread_mutex_unlock(&transport->lock);
    return 0;
}

/* The operation of a read whose plan fits; NULL after pd_fail. */
static op *open_read(pd_transport *transport, const pd_lease *lease, const pd_plan *plan, uint64_t tag)
{
    if (!plan->src_step || !plan->dst_step)
        return pd_fail(EINVAL, "a plan without a step"), NULL;
    if (lease->capability_bytes > PD_MAX_CAPABILITY)
        return pd_fail(EINVAL, "a capability has at most %d bytes", PD_MAX_CAPABILITY), NULL;
    op *read = op_open(transport, READ, tag);
    if (!read)
        return NULL;
    read->runs = duplicate(plan->runs, plan->num_runs, sizeof *plan->runs);
    read->patterns = duplicate(plan->patterns, plan->num_patterns, sizeof *plan->patterns);
    read->num_runs = plan->num_runs, read->num_patterns = plan->num_patterns;
    read->src_step = plan->src_step, read->dst_step = plan->dst_step;
    read->lease = *lease;
    read->slice_bytes = transport->backend->slice_bytes ? transport->backend->slice_bytes : PD_SLICE_BYTES;
    if (lease->capability_bytes)
        memcpy(read->capability, lease->capability, lease->capability_bytes);
    read->lease.capability = read->capability;
    bool fits = read->runs && read->patterns;
    if (!fits)
        pd_fail(ENOMEM, "no memory for a plan of %zu runs", plan->num_runs);
    if (!fits || check_plan(transport->memory, read, &read->left)) {
        op_free(pd_table_remove(&transport->tags, tag));
        return NULL;
    }
    return read;
}

int pd_post_read(pd_transport *transport, uint64_t peer_number, const pd_lease *lease, const pd_plan *plan, uint64_t tag,
                 int priority)
{
    pthread_mutex_lock(&transport->lock);
    op *read = open_read(transport, lease, plan, tag);
    peer *owner = read ? pd_table_get(&transport->peers, peer_number) : NULL;
    if (read && !read->left) {
        read->end.status = PD_DONE;
        complete(transport, read);
    } else if (read && (!owner || owner->lost || !owner->ready)) {
        read->end.status = PD_PEER_LOST;
        snprintf(read->end.words, sizeof read->end.words, "peer %s is not connected (or was lost): connect first",
                 owner ? owner->name : "");
        complete(transport, read);
    } else if (read) {
        read->memory = transport->memory;
        pd_retain(read->memory);
        read->priority = priority < 0 ? 0 : priority < PRIORITIES ? priority : PRIORITIES - 1;
        read->peer = owner;
        owner->refs++;
        read->next_of_peer = owner->reads;
        owner->reads = read;
        enqueue(transport, read);
    }
    pthread_mutex_unlock(&transport->lock);
    return read ? 0 : -EINVAL;
}

int pd_cancel(pd_transport *transport, uint64_t tag)
{
    pthread_mutex_lock(&transport->lock);
    op *read = pd_table_get(&transport->tags, tag);
    if (read && read->kind == READ && !read->over)
        end(transport, read, PD_CANCELLED, "cancelled");
    pthread_mutex_unlock(&transport->lock);
    return 0;
}

int pd_fence(pd_transport *transport, uint64_t number, uint64_t tag)
{
    pthread_mutex_lock(&transport->lock);
    op *fence = op_open(transport, FENCE, tag);
    peer *owner = fence ? pd_table_get(&transport->peers, number) : NULL;
    if (owner)
        end_all(transport, owner, PD_CANCELLED, "fenced");
    if (fence && transport->settling) {
        fence->when = ++transport->events;
        fence->waiting = transport->settling;
        fence->next_of_peer = transport->fences;
        transport->fences = fence;
    } else if (fence) {
        complete(transport, fence);
    }
    pthread_mutex_unlock(&transport->lock);
    return fence ? 0 : -EINVAL;
}

int pd_poll(pd_transport *transport, pd_completion *out, int limit)
{
    int taken = 0;
    pthread_mutex_lock(&transport->lock);
    while (taken < limit && transport->done) {
        op *each = transport->done;
        transport->done = each->next;
        out[taken++] = each->end;
        op_free(pd_table_remove(&transport->tags, each->end.tag));
    }
    if (!transport->done) {
        uint64_t rung;
        transport->done_tail = &transport->done;
        while (read(transport->bell, &rung, sizeof rung) < 0 && errno == EINTR)
            ;
    }
    pthread_mutex_unlock(&transport->lock);
    return taken;
}
