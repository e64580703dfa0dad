/* Queues of reads, their endings, and the threads that copy; see core.h. */

#include "core.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "net.h"

/* --- queues, all under the lock ----------------------------------------------------------------------------------- */

static void append(pd_transport *transport, op *each)
{
    op **head = &transport->queues[each->priority];
    if (*head) {
        each->next = *head, each->previous = (*head)->previous;
        each->previous->next = each->next->previous = each;
    } else {
        *head = each->next = each->previous = each;
    }
}

void enqueue(pd_transport *transport, op *each)
{
    append(transport, each);
    if (transport->backend->wake)
        transport->backend->wake(transport->own);
    else
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
void peer_release(pd_transport *transport, peer *each)
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

void op_free(op *each)
{
    pd_release(each->memory);
    free(each->runs);
    free(each->patterns);
    free(each->remote);
    free(each);
}

/* A new operation under a tag of its own; NULL after pd_fail. */
op *op_open(pd_transport *transport, op_kind kind, uint64_t tag)
{
    if (transport->stop)
        return pd_fail(ESHUTDOWN, "the transport is closed"), NULL;
    if (pd_table_get(&transport->tags, tag))
        return pd_fail(EEXIST, "tag %llu is still in use: every read needs a tag of its own", (unsigned long long)tag), NULL;
    if (kind == READ && transport->tags.count >= PD_MAX_OPEN_TAGS) /* what ends reads must always be possible */
        return pd_fail(ENOSPC, "%d reads are open already: wait for completions first", PD_MAX_OPEN_TAGS), NULL;
    op *made = calloc(1, sizeof *made);
    if (!made || !pd_table_put(&transport->tags, tag, made))
        return free(made), pd_fail(ENOMEM, "no memory for another read"), NULL;
    made->kind = kind;
    made->end.tag = tag;
    return made;
}

/* Hand the completion out; the tag stays in use until it is polled. */
void complete(pd_transport *transport, op *each)
{
    each->ended = each->over = true;
    each->next = NULL;
    *transport->done_tail = each;
    transport->done_tail = &each->next;
    uint64_t one = 1;
    while (write(transport->bell, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* A read that ended and that no thread is inside of: quiet. A fence is done when the last read is that was settling when
 * it was asked for, of whatever peer: a slice is short, and the peer that is meant may have been given up before. */
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
    for (at = &transport->fences; read->settling && *at;) {
        op *fence = *at;
        if (read->when > fence->when || --fence->waiting) {
            at = &fence->next_of_peer;
            continue;
        }
        *at = fence->next_of_peer;
        complete(transport, fence);
    }
    transport->settling -= read->settling;
    peer_release(transport, owner);
}

void end(pd_transport *transport, op *read, pd_status status, const char *words)
{
    if (read->ended)
        return;
    read->ended = true;
    read->settling = read->busy;
    transport->settling += read->settling;
    read->when = ++transport->events;
    read->end.status = status;
    snprintf(read->end.words, sizeof read->end.words, "%s", words);
    unqueue(transport, read);
    if (read->busy && transport->backend->wake)
        transport->backend->wake(transport->own);
    settle(transport, read);
}

/* The caller has a reference of its own. */
void end_all(pd_transport *transport, peer *owner, pd_status status, const char *words)
{
    for (op *read = owner->reads, *next; read; read = next) {
        next = read->next_of_peer;
        end(transport, read, status, words);
    }
}

/* --- slices, all under the lock ----------------------------------------------------------------------------------- */

/* The next slice of a read; it goes to the tail, so that the others have their turn. NULL: it ended for want of memory. */
static pd_taken *take(pd_transport *transport, op *read, pd_piece *pieces, pd_slice *slice)
{
    pd_taken *taken = transport->unused ? transport->unused : calloc(1, sizeof *taken);
    if (taken && taken == transport->unused)
        transport->unused = taken->next;
    uint64_t bytes = taken ? cut(transport, read, taken, pieces, &slice->count) : 0;
    if (!bytes) {
        free(taken);
        end(transport, read, PD_ERROR, "no memory for a slice");
        return NULL;
    }
    unqueue(transport, read);
    if (read->pattern < read->num_patterns)
        append(transport, read);
    read->busy++;
    taken->read = read;
    slice->tag = read->end.tag;
    slice->taken = taken;
    slice->lease = &read->lease;
    slice->pieces = pieces;
    slice->bytes = bytes;
    return taken;
}

static void lose(pd_transport *transport, peer *owner, const char *words)
{
    owner->lost = true;
    end_all(transport, owner, PD_PEER_LOST, words);
}

/* `words` without the peer's name. */
static void give(pd_transport *transport, pd_taken *taken, pd_status status, const char *words)
{
    op *read = taken->read;
    uint64_t bytes = taken->bytes;
    taken->next = transport->unused;
    transport->unused = taken;
    read->busy--;
    peer *owner = read->peer;
    owner->refs++;
    char whole[PD_MAX_WORDS] = "";
    if (status != PD_DONE)
        snprintf(whole, sizeof whole, "peer %s: %.*s", owner->name, PD_MAX_WORDS - 128 - 16, words);
    else
        read->left -= bytes;
    if (read->ended)
        settle(transport, read);
    else if (status != PD_DONE || !read->left)
        end(transport, read, status, whole);
    if (status == PD_PEER_LOST)
        lose(transport, owner, whole);
    peer_release(transport, owner);
}

void dialled(pd_transport *transport, peer *each, pd_status status, const char *words)
{
    op *connect = each->dialling;
    if (!connect)
        return;
    each->dialling = NULL;
    each->ready = status == PD_DONE;
    connect->end.status = status;
    if (status != PD_DONE)
        snprintf(connect->end.words, sizeof connect->end.words, "peer %s: %.*s", each->name, PD_MAX_WORDS - 128 - 16, words);
    complete(transport, connect);
    peer_release(transport, each);
}

/* --- for backends with threads of their own ----------------------------------------------------------------------- */

/* The read of a peer whose turn it is. */
static op *first_of(pd_transport *transport, const peer *owner)
{
    for (int i = 0; i < PRIORITIES; i++) {
        op *head = transport->queues[i], *each = head;
        if (head)
            do
                if (each->peer == owner)
                    return each;
            while ((each = each->next) != head);
    }
    return NULL;
}

pd_taken *pd_take(pd_transport *core, uint64_t number, pd_piece *pieces, pd_slice *slice)
{
    pthread_mutex_lock(&core->lock);
    peer *owner = pd_table_get(&core->peers, number);
    op *found = NULL;
    pd_taken *taken = NULL;
    do {
        found = owner ? first_of(core, owner) : NULL;
        taken = found ? take(core, found, pieces, slice) : NULL;
    } while (found && !taken);
    pthread_mutex_unlock(&core->lock);
    return taken;
}

bool pd_wanted(pd_transport *core, const pd_taken *taken)
{
    pthread_mutex_lock(&core->lock);
    bool wanted = !taken->read->ended;
    pthread_mutex_unlock(&core->lock);
    return wanted;
}

bool pd_closing(pd_transport *core)
{
    return pd_closing_for(core, 0);
}

bool pd_closing_for(pd_transport *core, int milliseconds)
{
    pthread_mutex_lock(&core->lock);
    bool closing = core->stop && net_now_ms() - core->stopped >= milliseconds;
    pthread_mutex_unlock(&core->lock);
    return closing;
}

void pd_abandon(pd_transport *core)
{
    atomic_store(&core->abandoned, true);
}

void pd_give(pd_transport *core, pd_taken *taken, pd_status status, const char *words)
{
    if (status == PD_DONE && (status = scatter(core, taken)) != PD_DONE)
        words = pd_last_error();
    pthread_mutex_lock(&core->lock);
    give(core, taken, status, words);
    pthread_mutex_unlock(&core->lock);
}

void pd_dialled(pd_transport *core, uint64_t number, pd_status status, const char *words)
{
    pthread_mutex_lock(&core->lock);
    peer *each = pd_table_get(&core->peers, number);
    if (each)
        dialled(core, each, status, words);
    pthread_mutex_unlock(&core->lock);
}

void pd_lost(pd_transport *core, uint64_t number, const char *words)
{
    pthread_mutex_lock(&core->lock);
    peer *each = pd_table_get(&core->peers, number);
    if (each) {
        char whole[PD_MAX_WORDS];
        snprintf(whole, sizeof whole, "peer %s: %.*s", each->name, PD_MAX_WORDS - 128 - 16, words);
        each->refs++;
        dialled(core, each, PD_PEER_LOST, words);
        lose(core, each, whole);
        peer_release(core, each);
    }
    pthread_mutex_unlock(&core->lock);
}

/* --- the threads -------------------------------------------------------------------------------------------------- */

/* Threads that one peer may hold up: never all of them. 0: any number, for peers that cannot. */
static int most_per_peer(const pd_transport *transport)
{
    int most = transport->backend->per_peer, others = transport->options.threads - 1;
    return most <= others || !most ? most : others < 1 ? 1 : others;
}

/* What a thread does next; NULL: nothing that it may. */
static op *next_op(pd_transport *transport)
{
    int most = most_per_peer(transport);
    for (int i = 0; i < PRIORITIES; i++) {
        op *head = transport->queues[i], *each = head;
        if (head)
            do {
                bool held_up = each->kind == CONNECT ? most && transport->connecting >= most : most && each->peer->busy >= most;
                if (!held_up)
                    return each;
            } while ((each = each->next) != head);
    }
    return NULL;
}

/* One slice of a read; called and returns under the lock. */
static void copy_slice(pd_transport *transport, op *read, pd_piece *pieces)
{
    pd_slice slice;
    peer *owner = read->peer;
    void *own = owner->own;
    pd_taken *taken = take(transport, read, pieces, &slice);
    if (!taken)
        return;
    owner->busy++;
    pthread_mutex_unlock(&transport->lock);
    pd_status status = transport->backend->read(own, &slice);
    if (status == PD_DONE)
        status = scatter(transport, taken);
    pthread_mutex_lock(&transport->lock);
    if (owner->busy-- == most_per_peer(transport))
        pthread_cond_broadcast(&transport->work); /* others may have passed its reads by */
    give(transport, taken, status, status == PD_DONE ? "" : pd_last_error());
}

static void connect_peer(pd_transport *transport, op *each)
{
    unqueue(transport, each);
    peer *owner = each->peer;
    transport->connecting++;
    pthread_mutex_unlock(&transport->lock);
    void *own = transport->backend->connect(transport->own, each->remote, each->remote_bytes);
    pthread_mutex_lock(&transport->lock);
    if (transport->connecting-- == most_per_peer(transport))
        pthread_cond_broadcast(&transport->work);
    owner->own = own;
    bool known = pd_table_get(&transport->peers, owner->number) == owner;
    owner->dialling = each;
    dialled(transport, owner, !known ? PD_CANCELLED : own ? PD_DONE : PD_PEER_LOST, known ? pd_last_error() : "disconnected");
}

void pd_pin(const pd_options *options, int index)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    /* Leave the one core that an engine may have pinned its threads to; the kernel keeps what the cpuset allows. */
    for (size_t i = 0; i < options->num_cpus; i++)
        CPU_SET((unsigned)options->cpus[i] % CPU_SETSIZE, &set);
    for (int i = 0; !options->num_cpus && i < CPU_SETSIZE; i++)
        CPU_SET(i, &set);
    sched_setaffinity(0, sizeof set, &set);
    if (!options->pin || sched_getaffinity(0, sizeof set, &set))
        return;
    int turn = index % CPU_COUNT(&set), cpu = 0;
    for (; !CPU_ISSET(cpu, &set) || turn; cpu++)
        turn -= CPU_ISSET(cpu, &set) != 0;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *run_thread(void *argument)
{
    pd_transport *transport = argument;
    pd_pin(&transport->options, atomic_fetch_add(&transport->started, 1));
    pd_piece *pieces = calloc(PD_SLICE_PIECES, sizeof *pieces);
    pthread_mutex_lock(&transport->lock);
    while (!transport->stop) {
        op *next = next_op(transport);
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

int pd_start(pthread_t *out, void *(*run)(void *), void *argument)
{
    sigset_t most, kept;
    sigfillset(&most);
    for (int i = 0, crashes[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}; i < 5; i++)
        sigdelset(&most, crashes[i]);
    pthread_sigmask(SIG_SETMASK, &most, &kept);
    int error = pthread_create(out, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &kept, NULL);
    return error;
}

/* Threads start with the first peer: an agent that only serves has none. */
int start_threads(pd_transport *transport)
{
    while (transport->running < transport->options.threads) {
        int error = pd_start(&transport->threads[transport->running], run_thread, transport);
        if (error && !transport->running)
            return pd_fail(error, "cannot start a copy thread: %s", strerror(error));
        if (error)
            break;
        transport->running++;
    }
    return 0;
}
