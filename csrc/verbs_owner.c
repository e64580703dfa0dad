/* The owner's side of the verbs backend: the connections of readers. Bytes are fetched by their devices; here are only
 * introductions, questions about leases, and writes for those who ask for them. Nothing that a reader sent is believed. */

#include "verbs.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { WRITES = 2 * VERBS_DEPTH }; /* of a reader that are under way at once; it is not listened to until one has ended */

/* A slice on its way to a reader. */
typedef struct writing {
    struct writing *next;
    keys *keys;
    uint64_t serial;
    cursor next_piece;
    bool posted;
    unsigned under_way;
    size_t count;
    uint32_t keys_there[VERBS_PIECES];
    pd_piece pieces[VERBS_PIECES];
} writing;

struct served {
    wire wire; /* first */
    queue queue;
    served *next;
    verbs *verbs;
    bool joined, closed;
    int64_t deadline;
    uint64_t generation;
    writing *writes;
    unsigned num_writes;
};

static void hang_up(served *each)
{
    if (each->closed)
        return;
    each->closed = true;
    each->deadline = INT64_MAX;
    wire_close(&each->wire);
}

static void writing_free(served *each, writing *gone)
{
    writing **at = &each->writes;
    while (*at != gone)
        at = &(*at)->next;
    *at = gone->next;
    each->num_writes--;
    keys_release(gone->keys);
    free(gone);
}

/* False: not yet. */
static bool served_free(served *each)
{
    if (each->queue.joining == TO_JOIN || !queue_free(&each->queue))
        return false;
    while (each->writes)
        writing_free(each, each->writes);
    each->verbs->num_served--;
    free(each);
    return true;
}

/* --- introductions ------------------------------------------------------------------------------------------------ */

static bool tell_memory(served *each)
{
    verbs *all = each->verbs;
    pthread_mutex_lock(&all->lock);
    uint64_t generation = all->generation;
    pthread_mutex_unlock(&all->lock);
    if (each->generation == generation)
        return true;
    unsigned char *body;
    size_t bytes;
    keys *held = keys_hold(all);
    bool told = memory_encode(held, each->queue.rail->index, &body, &bytes) &&
                wire_send(&each->wire, MEMORY, NULL, 0, body, bytes);
    free(body);
    keys_release(held);
    each->generation = generation;
    return told;
}

static void refuse(served *each, const char *words)
{
    wire_send(&each->wire, REFUSED, NULL, 0, words, strlen(words));
    hang_up(each);
}

static void landed(queue *self, void *what, bool whole);

static void arrived(queue *self, uint32_t serial)
{
    (void)self, (void)serial; /* readers write nothing */
}

static void join(served *each)
{
    verbs *all = each->verbs;
    verbs_join asked;
    if (each->wire.head.kind != JOIN || each->wire.head.bytes != sizeof asked || each->queue.rail) {
        hang_up(each);
        return;
    }
    memcpy(&asked, each->wire.in, sizeof asked);
    if (memcmp(asked.magic, verbs_magic, sizeof asked.magic)) {
        refuse(each, "it speaks another version of verbs");
    } else if (memcmp(asked.instance, all->where.instance, VERBS_INSTANCE)) {
        refuse(each, "another agent listens at its address now");
    } else if (asked.rail >= (uint32_t)all->num_rails) {
        refuse(each, "it has no such rail");
    } else if (queue_make(&each->queue, &all->rails[asked.rail])) {
        refuse(each, pd_last_error());
    } else {
        rail *on = each->queue.rail;
        each->queue.landed = landed, each->queue.arrived = arrived;
        asked.end.reads = asked.end.reads < on->reads_in ? asked.end.reads : (uint8_t)on->reads_in;
        each->queue.end.reads = asked.end.reads;
        queue_join(&each->queue, &asked.end);
    }
}

/* The queue pair is joined, or will never be. */
static void introduce(served *each)
{
    const rail *on = each->queue.rail;
    verbs_joined answer = {each->queue.end, (uintptr_t)on->token, on->token_mr->rkey, 0};
    if (each->queue.joining == JOINED_ILL) {
        refuse(each, each->queue.words);
        return;
    }
    each->joined = true;
    each->deadline = INT64_MAX;
    if (!tell_memory(each) || !wire_send(&each->wire, JOINED, &answer, sizeof answer, NULL, 0))
        hang_up(each);
}

/* --- questions ---------------------------------------------------------------------------------------------------- */

static void answer(served *each, uint64_t serial, pd_status status, const char *words)
{
    verbs_answer head = {serial, status, 0};
    if (!wire_send(&each->wire, ANSWER, &head, sizeof head, words, strlen(words)))
        hang_up(each);
}

static void answer_ask(served *each, const verbs_ask *asked)
{
    grants *leases = &each->verbs->leases;
    char words[PD_MAX_WORDS];
    unsigned char *body = NULL;
    size_t bytes = 0;
    pthread_mutex_lock(&leases->lock);
    const grant *leased = grants_find(leases, asked->number, asked->epoch);
    bool known = leased, opens = leased && grant_opens(leased, asked->capability, asked->capability_bytes);
    verbs_answer head = {asked->serial, PD_DONE, opens ? (uint32_t)leased->num_groups : 0};
    bool encoded = opens && grant_encode(leased, &body, &bytes);
    pthread_mutex_unlock(&leases->lock);
    if (!opens)
        grant_refuse(known, asked->number, asked->epoch, words);
    if (!opens)
        answer(each, asked->serial, PD_NOT_GRANTED, words);
    else if (!encoded)
        answer(each, asked->serial, PD_ERROR, "the owner has no memory to list its blocks, or they are too many");
    else if (!wire_send(&each->wire, ANSWER, &head, sizeof head, body, bytes))
        hang_up(each);
    free(body);
}

/* --- writes ------------------------------------------------------------------------------------------------------- */

static void post_writes(served *each, writing *one)
{
    ib_send_wr requests[VERBS_BATCH];
    ib_sge places[VERBS_BATCH];
    while (!one->posted && each->queue.room && !each->queue.broken && !each->closed) {
        unsigned count = 0, most = each->queue.room < VERBS_BATCH ? each->queue.room : VERBS_BATCH;
        uint64_t src, dst, bytes, total = 0;
        while (count < most && cursor_at(&one->next_piece, one->keys->memory, one->pieces, one->count, &src, &dst, &bytes)) {
            const ib_mr *here = keys_find(one->keys, each->queue.rail->index, src, &bytes);
            if (!here) {
                hang_up(each);
                return;
            }
            places[count] = (ib_sge){src, (uint32_t)bytes, here->lkey};
            requests[count] = (ib_send_wr){.sg_list = &places[count],
                                           .num_sge = 1,
                                           .opcode = IB_WR_RDMA_WRITE,
                                           .rdma = {dst, one->keys_there[one->next_piece.piece], {0}}};
            cursor_move(&one->next_piece, one->pieces, bytes);
            total += bytes;
            count++;
        }
        one->posted = one->next_piece.piece == one->count;
        if (one->posted) { /* its arrival tells that all before it are there */
            requests[count - 1].opcode = IB_WR_RDMA_WRITE_WITH_IMM;
            requests[count - 1].imm_data = htonl((uint32_t)one->serial);
        }
        if (queue_post(&each->queue, requests, count, one)) {
            hang_up(each);
            return;
        }
        one->under_way++;
        atomic_fetch_add(&each->verbs->counts.writes, count);
        atomic_fetch_add(&each->verbs->counts.bytes, total);
    }
}

static void advance(served *each)
{
    for (writing *one = each->writes; one; one = one->next)
        post_writes(each, one);
}

static void landed(queue *self, void *what, bool whole)
{
    served *each = (served *)((char *)self - offsetof(served, queue));
    writing *one = what;
    if (!whole || each->closed)
        return;
    if (!--one->under_way && one->posted)
        writing_free(each, one);
    wire_listen(&each->wire, each->num_writes < WRITES);
}

/* What is wrong with a request, in `words`; the pieces go to `made`. */
static pd_status judge(served *each, const verbs_ask *asked, const unsigned char *body, writing *made, char *words)
{
    grants *leases = &each->verbs->leases;
    pd_status status = PD_DONE;
    pthread_mutex_lock(&leases->lock);
    const grant *leased = grants_find(leases, asked->number, asked->epoch);
    bool refused = !leased || !grant_opens(leased, asked->capability, asked->capability_bytes);
    for (; made->count < asked->pieces && status != PD_ERROR; made->count++, body += sizeof(verbs_piece)) {
        verbs_piece piece;
        memcpy(&piece, body, sizeof piece);
        made->pieces[made->count] = (pd_piece){
            piece.grid, piece.offset, piece.bytes, piece.block, piece.blocks, (unsigned char *)(uintptr_t)piece.dst};
        made->keys_there[made->count] = piece.key;
        status = grant_judge(leased, made->keys->memory, &made->pieces[made->count], words);
        refused |= status == PD_NOT_GRANTED;
    }
    pthread_mutex_unlock(&leases->lock);
    if (status == PD_ERROR || !refused)
        return status;
    grant_refuse(leased, asked->number, asked->epoch, words);
    return PD_NOT_GRANTED;
}

static bool plausible(const verbs_ask *asked, const unsigned char *body)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < asked->pieces; i++, body += sizeof(verbs_piece)) {
        verbs_piece piece;
        memcpy(&piece, body, sizeof piece);
        if (!piece.bytes || !piece.blocks || piece.bytes > PD_SLICE_BYTES || piece.blocks > PD_SLICE_BYTES)
            return false;
        total += piece.bytes * piece.blocks;
    }
    return total && total <= PD_SLICE_BYTES;
}

static void start_write(served *each, const verbs_ask *asked, const unsigned char *body)
{
    writing *made = plausible(asked, body) ? malloc(sizeof *made) : NULL;
    if (!made) {
        hang_up(each);
        return;
    }
    char words[PD_MAX_WORDS];
    made->next_piece = (cursor){0, 0, 0};
    made->posted = false;
    made->under_way = 0;
    made->count = 0;
    made->serial = asked->serial;
    made->keys = keys_hold(each->verbs);
    pd_status status = judge(each, asked, body, made, words);
    if (status != PD_DONE) {
        keys_release(made->keys);
        free(made);
        answer(each, asked->serial, status, words);
        return;
    }
    writing **last = &each->writes;
    while (*last)
        last = &(*last)->next;
    made->next = NULL;
    *last = made;
    each->num_writes++;
    /* A reader may have seen the last write come before we are told that it went: it waits for that. */
    wire_listen(&each->wire, each->num_writes < WRITES);
    advance(each);
}

/* --- what comes --------------------------------------------------------------------------------------------------- */

static void take_message(served *each)
{
    verbs_ask asked;
    size_t bytes = each->wire.head.bytes;
    if (!each->joined) {
        join(each);
        return;
    }
    if (bytes >= sizeof asked)
        memcpy(&asked, each->wire.in, sizeof asked);
    if (bytes < sizeof asked || asked.capability_bytes > PD_MAX_CAPABILITY || asked.pieces > VERBS_PIECES ||
        bytes != sizeof asked + asked.pieces * sizeof(verbs_piece))
        hang_up(each);
    else if (each->wire.head.kind == ASK && !asked.pieces)
        answer_ask(each, &asked);
    else if (each->wire.head.kind == WRITE)
        start_write(each, &asked, each->wire.in + sizeof asked);
    else
        hang_up(each);
}

static void served_ready(source *self, uint32_t events)
{
    served *each = (served *)self;
    if (each->closed)
        return;
    if (events & EPOLLOUT && !wire_flush(&each->wire)) {
        hang_up(each);
        return;
    }
    for (int turns = 0; !each->closed && !each->wire.deaf && turns < 16; turns++) { /* then the others have their turn */
        size_t most = each->joined ? sizeof(verbs_ask) + VERBS_PIECES * sizeof(verbs_piece) : sizeof(verbs_join);
        int got = wire_receive(&each->wire, most);
        if (!got)
            return;
        if (got > 0)
            take_message(each);
        else
            hang_up(each);
    }
}

static void turn_away(int fd)
{
    static const char words[] = "it serves as many connections as it can: fewer peers, or 'queue_pairs': 1";
    struct {
        verbs_head head;
        char words[sizeof words - 1];
    } message = {{REFUSED, sizeof words - 1}, {0}};
    memcpy(message.words, words, sizeof words - 1);
    send(fd, &message, sizeof message.head + sizeof message.words, MSG_NOSIGNAL);
    close(fd);
}

/* Whoever has been standing at the door for longest, if there are too many. */
static void show_out(verbs *all)
{
    served *oldest = NULL; /* new ones are put first */
    int count = 0;
    for (served *one = all->served; one; one = one->next)
        if (!one->joined && !one->closed)
            oldest = one, count++;
    if (count >= VERBS_STRANGERS)
        hang_up(oldest);
}

static void accept_ready(source *self, uint32_t events)
{
    (void)events;
    verbs *all = (verbs *)((char *)self - offsetof(verbs, listener));
    int fd = net_accept(self->fd, &all->spare);
    if (fd < 0)
        return;
    served *made = all->num_served < VERBS_CONNECTIONS ? calloc(1, sizeof *made) : NULL;
    if (!made) {
        turn_away(fd);
        return;
    }
    show_out(all);
    net_tune(fd);
    made->verbs = all;
    made->deadline = net_now_ms() + VERBS_GREETING_MS;
    made->next = all->served;
    all->served = made;
    all->num_served++;
    wire_open(&made->wire, all->epoll, fd, served_ready, false);
}

int verbs_listen(verbs *all)
{
    int fd = net_listen(all->options, &all->where.at);
    if (fd < 0)
        return fd;
    all->listener = (source){accept_ready, fd};
    net_watch(all->epoll, &all->listener, false, false);
    return 0;
}

/* --- the loop's calls --------------------------------------------------------------------------------------------- */

void served_turn(verbs *all)
{
    int64_t now = net_now_ms();
    for (served **at = &all->served; *at;) {
        served *one = *at;
        if (one->deadline <= now || one->queue.broken)
            hang_up(one);
        if (!one->closed && !one->joined && one->queue.joining > TO_JOIN)
            introduce(one);
        if (!one->closed && one->joined && !tell_memory(one))
            hang_up(one);
        if (!one->closed)
            advance(one);
        served *next = one->next;
        if (one->closed && served_free(one))
            *at = next;
        else
            at = &one->next;
    }
}

/* After the thread. */
void served_close(verbs *all)
{
    for (served *one; (one = all->served);) {
        all->served = one->next;
        hang_up(one);
        served_free(one);
    }
}

int64_t served_deadline(const verbs *all)
{
    int64_t first = INT64_MAX;
    for (const served *one = all->served; one; one = one->next)
        first = one->deadline < first ? one->deadline : first;
    return first;
}
