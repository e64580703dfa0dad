/* Queues of reads, their endings, and the threads that copy; see core.h. */

#include "core.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* --- queues, all under the lock ----------------------------------------------------------------------------------- */

void enqueue(pd_transport *transport, op *each)
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
    memory_release(each->memory);
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

/* --- the threads -------------------------------------------------------------------------------------------------- */

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
    snprintf(words, sizeof words, "peer %s: %.*s", read->peer->name, PD_MAX_WORDS - 128 - 16, pd_last_error());
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
        snprintf(each->end.words, sizeof each->end.words, "peer %s: %.*s", owner->name, PD_MAX_WORDS - 128 - 16, pd_last_error());
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
int start_threads(pd_transport *transport)
{
    sigset_t all, kept;
    sigfillset(&all);
    while (transport->running < transport->options.threads) {
        pthread_sigmask(SIG_SETMASK, &all, &kept); /* signals are for the host's own threads */
        int error = pthread_create(&transport->threads[transport->running], NULL, run_thread, transport);
        pthread_sigmask(SIG_SETMASK, &kept, NULL);
        if (error && !transport->running)
            return pd_fail(error, "cannot start a copy thread: %s", strerror(error));
        if (error)
            break;
        transport->running++;
    }
    return 0;
}
