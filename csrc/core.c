/* Transports over any backend: tags, peers, queues of reads cut into slices, the threads that copy them, and endings.
 *
 * A read is a plan with a cursor. Threads take the next slice of the read whose turn it is: lower priority numbers
 * first, reads of one priority in turn, so a small read is never behind a big one. A read that ended (all copied, failed,
 * cancelled, its peer gone) hands out no further slice, and its completion is given when no thread is inside one of its
 * slices any more: then nothing can write to its destination.
 *
 * One lock guards everything here; it is never held while bytes move. */

#include "backend.h"
#include "table.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { PRIORITIES = 2, MAX_THREADS = 64 };

typedef enum { READ, CONNECT, FENCE } op_kind;

typedef struct peer {
    uint64_t number;
    int refs;
    bool lost;
    void *own;               /* the backend's, from when its CONNECT is done */
    struct op *reads, *fences; /* that are not complete */
    char name[128];
} peer;

/* What one tag stands for. */
typedef struct op {
    op_kind kind;
    pd_completion end;
    bool ended; /* hands out nothing more; `end` says why */
    bool over;  /* handed out as a completion */
    int busy;   /* threads inside */
    int priority;
    uint64_t sequence;
    struct op *next, *previous; /* in a queue; then `next` among the completed */
    struct op *next_of_peer;
    peer *peer;
    /* READ */
    pd_lease lease;
    unsigned char capability[PD_MAX_CAPABILITY];
    pd_memory *memory;
    pd_run *runs;
    pd_pattern *patterns;
    size_t num_runs, num_patterns;
    size_t pattern, run; /* with block and byte the cursor: what comes next */
    uint64_t block, byte;
    uint64_t left; /* bytes that no finished slice has copied */
    /* CONNECT */
    unsigned char *remote;
    size_t remote_bytes;
    /* FENCE */
    size_t waiting; /* reads that must complete before */
} op;

struct pd_transport {
    const pd_backend *backend;
    void *own;
    pthread_mutex_t lock, owner_lock; /* owner_lock: the backend's publish, grant and revoke */
    pthread_cond_t work;
    bool stop;
    int bell;
    uint64_t sequence;
    pd_memory *memory;
    pd_table peers, tags;
    op *queues[PRIORITIES]; /* rings: the head's previous is the tail */
    op *done, **done_tail;
    pd_options options;
    int *cpus;
    pthread_t threads[MAX_THREADS];
    int running;
};

static const pd_backend *const backends[] = {&pd_shm};

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

/* --- memory ------------------------------------------------------------------------------------------------------- */

static void memory_release(pd_memory *memory)
{
    if (memory && !--memory->refs) {
        free(memory->regions);
        free(memory->grids);
        free(memory);
    }
}

static void *duplicate(const void *data, size_t count, size_t size)
{
    void *copy = calloc(count ? count : 1, size);
    if (copy && count)
        memcpy(copy, data, count * size);
    return copy;
}

static pd_memory *memory_make(const pd_region *regions, size_t num_regions, const pd_grid *grids, size_t num_grids)
{
    pd_memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        return NULL;
    *memory = (pd_memory){1, num_regions, num_grids, duplicate(regions, num_regions, sizeof *regions),
                          duplicate(grids, num_grids, sizeof *grids)};
    if (!memory->regions || !memory->grids) {
        memory_release(memory);
        return NULL;
    }
    return memory;
}

static int check_grids(const pd_region *regions, size_t num_regions, const pd_grid *grids, size_t num_grids)
{
    for (size_t i = 0; i < num_grids; i++) {
        const pd_grid *grid = &grids[i];
        uint64_t last;
        if (grid->region >= num_regions || !grid->num_blocks || !grid->block_bytes ||
            grid->block_stride < grid->block_bytes || grid->num_blocks > UINT32_MAX ||
            __builtin_mul_overflow(grid->num_blocks - 1, grid->block_stride, &last) ||
            __builtin_add_overflow(last, grid->block_bytes, &last) ||
            __builtin_add_overflow(last, grid->offset, &last) || last > regions[grid->region].length)
            return pd_fail(EINVAL, "grid %zu does not lie in its region", i);
    }
    return 0;
}

/* Every destination byte lies in a block registered here, none is written twice by two runs as far as counting can tell,
 * and the source is one that some owner could have. The number of bytes goes to `total`. */
static int check_plan(const pd_memory *memory, const op *read, uint64_t *total)
{
    uint64_t blocks = 0, last = 0, per_block = 0;
    for (size_t i = 0; i < read->num_runs; i++) {
        const pd_run *run = &read->runs[i];
        if (!run->count)
            return pd_fail(EINVAL, "a run of a plan has no blocks");
        if ((uint64_t)run->src_block + run->count > (uint64_t)UINT32_MAX + 1)
            return pd_fail(EINVAL, "a run of the plan ends beyond block 2**32-1 of its source");
        blocks += run->count;
        if ((uint64_t)run->dst_block + run->count > last)
            last = (uint64_t)run->dst_block + run->count;
    }
    for (size_t i = 0; i < read->num_patterns; i++) {
        const pd_pattern *pattern = &read->patterns[i];
        if (pattern->src_grid >= 1ull << 48 || pattern->src_offset >= 1ull << 48)
            return pd_fail(EINVAL, "a pattern of the plan has an impossible source grid or offset");
        if (!read->num_runs)
            continue;
        if (pattern->dst_grid >= memory->num_grids)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: grid %llu does not exist",
                           (unsigned long long)pattern->dst_grid);
        const pd_grid *grid = &memory->grids[pattern->dst_grid];
        if (!pattern->bytes || pattern->bytes > grid->block_bytes || pattern->dst_offset > grid->block_bytes - pattern->bytes)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: %llu bytes at %llu of a block of %llu",
                           (unsigned long long)pattern->bytes, (unsigned long long)pattern->dst_offset,
                           (unsigned long long)grid->block_bytes);
        if (last > grid->num_blocks)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: block %llu of grid %llu of %llu",
                           (unsigned long long)last - 1, (unsigned long long)pattern->dst_grid,
                           (unsigned long long)grid->num_blocks);
        if (blocks > grid->num_blocks)
            return pd_fail(EINVAL, "the plan writes %llu blocks into %llu: one is named twice", (unsigned long long)blocks,
                           (unsigned long long)grid->num_blocks);
        per_block += pattern->bytes;
    }
    *total = blocks * per_block;
    return 0;
}

/* --- queues, all under the lock ----------------------------------------------------------------------------------- */

static void enqueue(pd_transport *transport, op *each)
{
    op **head = &transport->queues[each->priority];
    if (*head) {
        each->next = *head, each->previous = (*head)->previous;
        each->previous->next = each->next->previous = each;
    } else {
        *head = each->next = each->previous = each;
    }
    pthread_cond_broadcast(&transport->work);
}

static void unqueue(pd_transport *transport, op *each)
{
    if (!each->next)
        return;
    op **head = &transport->queues[each->priority];
    if (each->next == each)
        *head = NULL;
    else if (*head == each)
        *head = each->next;
    each->next->previous = each->previous;
    each->previous->next = each->next;
    each->next = each->previous = NULL;
}

/* --- endings, all under the lock ---------------------------------------------------------------------------------- */

/* Give the lock away to free what the backend keeps of a peer that nobody knows any more. */
static void peer_release(pd_transport *transport, peer *each)
{
    if (--each->refs)
        return;
    if (each->own) {
        pthread_mutex_unlock(&transport->lock);
        transport->backend->disconnect(each->own);
        pthread_mutex_lock(&transport->lock);
    }
    free(each);
}

static void op_free(op *each)
{
    memory_release(each->memory);
    free(each->runs);
    free(each->patterns);
    free(each->remote);
    free(each);
}

/* A new operation under a tag of its own; NULL after pd_fail. */
static op *op_open(pd_transport *transport, op_kind kind, uint64_t tag)
{
    if (transport->stop)
        return pd_fail(ESHUTDOWN, "the transport is closed"), NULL;
    if (pd_table_get(&transport->tags, tag))
        return pd_fail(EEXIST, "tag %llu is still in use: every read needs a tag of its own", (unsigned long long)tag), NULL;
    if (transport->tags.count >= PD_MAX_OPEN_TAGS)
        return pd_fail(ENOSPC, "%d reads are open already: wait for completions first", PD_MAX_OPEN_TAGS), NULL;
    op *made = calloc(1, sizeof *made);
    if (!made || !pd_table_put(&transport->tags, tag, made))
        return free(made), pd_fail(ENOMEM, "no memory for another read"), NULL;
    made->kind = kind;
    made->end.tag = tag;
    made->sequence = ++transport->sequence;
    return made;
}

/* Hand the completion out; the tag stays in use until it is polled. */
static void complete(pd_transport *transport, op *each)
{
    each->over = true;
    each->next = NULL;
    *transport->done_tail = each;
    transport->done_tail = &each->next;
    uint64_t one = 1;
    while (write(transport->bell, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* A read that ended and that no thread is inside of: quiet. Fences that waited for it are done. */
static void settle(pd_transport *transport, op *read)
{
    if (!read->ended || read->busy)
        return;
    peer *owner = read->peer;
    op **at = &owner->reads;
    while (*at != read)
        at = &(*at)->next_of_peer;
    *at = read->next_of_peer;
    complete(transport, read);
    for (at = &owner->fences; *at;) {
        op *fence = *at;
        if (read->sequence > fence->sequence || --fence->waiting) {
            at = &fence->next_of_peer;
            continue;
        }
        *at = fence->next_of_peer;
        complete(transport, fence);
        owner->refs--; /* not the last one: the read has one */
    }
    peer_release(transport, owner);
}

static void end(pd_transport *transport, op *read, pd_status status, const char *words)
{
    if (read->ended)
        return;
    read->ended = true;
    read->end.status = status;
    snprintf(read->end.words, sizeof read->end.words, "%s", words);
    unqueue(transport, read);
    settle(transport, read);
}

/* The caller has a reference of its own. */
static void end_all(pd_transport *transport, peer *owner, pd_status status, const char *words)
{
    for (op *read = owner->reads, *next; read; read = next) {
        next = read->next_of_peer;
        end(transport, read, status, words);
    }
}

/* --- the threads -------------------------------------------------------------------------------------------------- */

/* The next slice of a read: its pieces, and their bytes as the return value; 0 when all of it was handed out. */
static uint64_t cut(op *read, pd_piece *pieces, size_t *count)
{
    uint64_t total = 0;
    *count = 0;
    while (read->pattern < read->num_patterns && total < PD_SLICE_BYTES && *count < PD_SLICE_PIECES) {
        const pd_pattern *pattern = &read->patterns[read->pattern];
        const pd_run *run = &read->runs[read->run];
        const pd_grid *grid = &read->memory->grids[pattern->dst_grid];
        uint64_t room = PD_SLICE_BYTES - total, bytes = pattern->bytes - read->byte, blocks = 1;
        if (read->byte || bytes > room)
            bytes = bytes < room ? bytes : room;
        else if (grid->block_stride == bytes)
            blocks = run->count - read->block < room / bytes ? run->count - read->block : room / bytes;
        pieces[(*count)++] = (pd_piece){
            .grid = pattern->src_grid,
            .block = run->src_block + read->block,
            .blocks = blocks,
            .offset = pattern->src_offset + read->byte,
            .bytes = bytes,
            .dst = (unsigned char *)(uintptr_t)read->memory->regions[grid->region].address + grid->offset +
                   (run->dst_block + read->block) * grid->block_stride + pattern->dst_offset + read->byte,
        };
        total += bytes * blocks;
        read->byte += bytes;
        if (read->byte < pattern->bytes && blocks == 1)
            continue;
        read->byte = 0;
        read->block += blocks;
        if (read->block == run->count) {
            read->block = 0;
            if (++read->run == read->num_runs) {
                read->run = 0;
                read->pattern++;
            }
        }
    }
    return total;
}

/* One slice of the read at the head of the queue; called and returns under the lock. */
static void copy_slice(pd_transport *transport, op *read, pd_piece *pieces)
{
    size_t count;
    uint64_t bytes = cut(read, pieces, &count);
    if (read->pattern == read->num_patterns)
        unqueue(transport, read);
    else
        transport->queues[read->priority] = read->next; /* the others' turn */
    read->busy++;
    void *own = read->peer->own;
    pd_slice slice = {&read->lease, pieces, count};
    pthread_mutex_unlock(&transport->lock);
    pd_status status = transport->backend->read(own, &slice);
    pthread_mutex_lock(&transport->lock);
    read->busy--;
    if (status == PD_DONE) {
        read->left -= bytes;
        if (read->ended)
            settle(transport, read);
        else if (!read->left)
            end(transport, read, PD_DONE, "");
        return;
    }
    char words[PD_MAX_WORDS];
    snprintf(words, sizeof words, "peer %s: %.*s", read->peer->name, PD_MAX_WORDS - 128 - 16, last_error);
    peer *owner = read->peer;
    owner->refs++;
    if (read->ended)
        settle(transport, read);
    else
        end(transport, read, status, words);
    if (status == PD_PEER_LOST) {
        owner->lost = true;
        end_all(transport, owner, status, words);
    }
    peer_release(transport, owner);
}

static void connect_peer(pd_transport *transport, op *each)
{
    unqueue(transport, each);
    peer *owner = each->peer;
    pthread_mutex_unlock(&transport->lock);
    void *own = transport->backend->connect(each->remote, each->remote_bytes);
    pthread_mutex_lock(&transport->lock);
    owner->own = own;
    owner->lost = !own;
    bool known = pd_table_get(&transport->peers, owner->number) == owner;
    each->end.status = !known ? PD_CANCELLED : own ? PD_DONE : PD_PEER_LOST;
    if (!own)
        snprintf(each->end.words, sizeof each->end.words, "peer %s: %.*s", owner->name, PD_MAX_WORDS - 128 - 16, last_error);
    complete(transport, each);
    peer_release(transport, owner);
}

static void *run_thread(void *argument)
{
    pd_transport *transport = argument;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    /* Leave the one core that an engine may have pinned its threads to; the kernel keeps what the cpuset allows. */
    for (size_t i = 0; i < transport->options.num_cpus; i++)
        CPU_SET((unsigned)transport->cpus[i] % CPU_SETSIZE, &cpus);
    for (int i = 0; !transport->options.num_cpus && i < CPU_SETSIZE; i++)
        CPU_SET(i, &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);
    pd_piece *pieces = calloc(PD_SLICE_PIECES, sizeof *pieces);
    pthread_mutex_lock(&transport->lock);
    while (!transport->stop) {
        op *next = NULL;
        for (int i = 0; i < PRIORITIES && !next; i++)
            next = transport->queues[i];
        if (!next)
            pthread_cond_wait(&transport->work, &transport->lock);
        else if (next->kind == CONNECT)
            connect_peer(transport, next);
        else if (pieces)
            copy_slice(transport, next, pieces);
        else
            end(transport, next, PD_ERROR, "no memory for the copy thread");
    }
    pthread_mutex_unlock(&transport->lock);
    free(pieces);
    return NULL;
}

/* Threads start with the first peer: an agent that only serves has none. */
static int start_threads(pd_transport *transport)
{
    while (transport->running < transport->options.threads) {
        int error = pthread_create(&transport->threads[transport->running], NULL, run_thread, transport);
        if (error && !transport->running)
            return pd_fail(error, "cannot start a copy thread: %s", strerror(error));
        if (error)
            break;
        transport->running++;
    }
    return 0;
}

/* --- the interface ------------------------------------------------------------------------------------------------ */

int pd_open(const char *backend, const pd_options *options, pd_transport **out)
{
    for (size_t i = 0; i < sizeof backends / sizeof *backends; i++) {
        if (strcmp(backends[i]->name, backend))
            continue;
        pd_transport *made = calloc(1, sizeof *made);
        if (!made)
            return pd_fail(ENOMEM, "no memory");
        made->backend = backends[i];
        made->options = *options;
        made->options.threads = options->threads < 1 ? 1 : options->threads > MAX_THREADS ? MAX_THREADS : options->threads;
        made->cpus = duplicate(options->cpus, options->num_cpus, sizeof *options->cpus);
        made->memory = memory_make(NULL, 0, NULL, 0);
        made->done_tail = &made->done;
        made->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        pthread_mutex_init(&made->lock, NULL);
        pthread_mutex_init(&made->owner_lock, NULL);
        pthread_cond_init(&made->work, NULL);
        if (!made->cpus || !made->memory || made->bell < 0)
            pd_fail(errno ? errno : ENOMEM, "cannot open %s: %s", backend, strerror(errno));
        else
            made->own = made->backend->open();
        if (!made->own) {
            pd_close(made);
            return -EIO;
        }
        *out = made;
        return 0;
    }
    return pd_fail(ENOENT, "there is no backend %s", backend);
}

void pd_close(pd_transport *transport)
{
    pthread_mutex_lock(&transport->lock);
    transport->stop = true;
    pthread_cond_broadcast(&transport->work);
    pthread_mutex_unlock(&transport->lock);
    for (int i = 0; i < transport->running; i++)
        pthread_join(transport->threads[i], NULL);
    pthread_mutex_lock(&transport->lock); /* nothing copies any more, so every read is quiet once it ended */
    for (size_t i = 0; i < transport->tags.room; i++) {
        op *each = transport->tags.entries[i].value;
        if (each && each->kind == READ)
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
    free(transport->tags.entries);
    free(transport->peers.entries);
    if (transport->own)
        transport->backend->close(transport->own);
    if (transport->memory)
        memory_release(transport->memory);
    if (transport->bell >= 0)
        close(transport->bell);
    free(transport->cpus);
    pthread_mutex_destroy(&transport->lock);
    pthread_mutex_destroy(&transport->owner_lock);
    pthread_cond_destroy(&transport->work);
    free(transport);
}

int pd_fileno(const pd_transport *transport)
{
    return transport->bell;
}

int pd_describe(pd_transport *transport, unsigned char *out, size_t room)
{
    return transport->backend->describe(transport->own, out, room);
}

int pd_can_reach(pd_transport *transport, const unsigned char *remote, size_t bytes)
{
    return transport->backend->can_reach(remote, bytes);
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
    pthread_mutex_unlock(&transport->owner_lock);
    pthread_mutex_lock(&transport->lock);
    pd_memory *old = error ? made : transport->memory;
    if (!error)
        transport->memory = made;
    memory_release(old);
    pthread_mutex_unlock(&transport->lock);
    return error;
}

int pd_grant(pd_transport *transport, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
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
    if (!each || !each->remote || start_threads(transport) || !pd_table_put(&transport->peers, number, made)) {
        error = made && !each ? -EINVAL : pd_fail(ENOMEM, "cannot connect: no memory or no thread");
        if (each)
            op_free(pd_table_remove(&transport->tags, tag));
        free(made);
    } else {
        each->peer = made;
        enqueue(transport, each);
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
        peer_release(transport, owner);
    }
    pthread_mutex_unlock(&transport->lock);
    return 0;
}

/* The operation of a read whose plan fits; NULL after pd_fail. */
static op *open_read(pd_transport *transport, const pd_lease *lease, const pd_run *runs, size_t num_runs,
                     const pd_pattern *patterns, size_t num_patterns, uint64_t tag)
{
    if (lease->capability_bytes > PD_MAX_CAPABILITY)
        return pd_fail(EINVAL, "a capability has at most %d bytes", PD_MAX_CAPABILITY), NULL;
    op *read = op_open(transport, READ, tag);
    if (!read)
        return NULL;
    read->runs = duplicate(runs, num_runs, sizeof *runs);
    read->patterns = duplicate(patterns, num_patterns, sizeof *patterns);
    read->num_runs = num_runs;
    read->num_patterns = num_patterns;
    read->lease = *lease;
    if (lease->capability_bytes)
        memcpy(read->capability, lease->capability, lease->capability_bytes);
    read->lease.capability = read->capability;
    bool fits = read->runs && read->patterns;
    if (!fits)
        pd_fail(ENOMEM, "no memory for a plan of %zu runs", num_runs);
    if (!fits || check_plan(transport->memory, read, &read->left)) {
        op_free(pd_table_remove(&transport->tags, tag));
        return NULL;
    }
    return read;
}

int pd_post_read(pd_transport *transport, uint64_t peer_number, const pd_lease *lease, const pd_run *runs,
                 size_t num_runs, const pd_pattern *patterns, size_t num_patterns, uint64_t tag, int priority)
{
    pthread_mutex_lock(&transport->lock);
    op *read = open_read(transport, lease, runs, num_runs, patterns, num_patterns, tag);
    peer *owner = read ? pd_table_get(&transport->peers, peer_number) : NULL;
    if (read && !read->left) {
        read->end.status = PD_DONE;
        complete(transport, read);
    } else if (read && (!owner || owner->lost || !owner->own)) {
        read->end.status = PD_PEER_LOST;
        snprintf(read->end.words, sizeof read->end.words, "peer %s is not connected (or was lost): connect first",
                 owner ? owner->name : "");
        complete(transport, read);
    } else if (read) {
        read->memory = transport->memory;
        read->memory->refs++;
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
    if (owner) {
        end_all(transport, owner, PD_CANCELLED, "fenced");
        for (op *read = owner->reads; read; read = read->next_of_peer)
            fence->waiting++;
    }
    if (fence && fence->waiting) {
        fence->next_of_peer = owner->fences;
        owner->fences = fence;
        owner->refs++;
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
