/* The owner's side of the tcp backend: the connections of readers. Nothing that a reader sent is believed: lengths are
 * bounded before they are used, addresses checked against the grids, blocks against the lease (grants.c). */

#include "tcp.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

/* --- connections -------------------------------------------------------------------------------------------------- */

typedef enum { GREETING, REQUEST, PIECES, ANSWER, CLOSED } state;

struct connection {
    source source;
    connection *next;
    loop *loop;
    state state;
    bool writing;
    int64_t deadline;
    size_t got; /* of what the state waits for */
    union {
        unsigned char bytes[sizeof(request)];
        greeting greeting;
        request request;
    } in;
    wire_piece *pieces;
    /* The answer: what of its head is left, then of its words or blocks. */
    answer head;
    size_t head_at;
    char words[PD_MAX_WORDS];
    uint32_t left;
    pd_memory *memory;
    size_t piece;
    uint32_t block;
    uint64_t byte;
};

static void hang_up(connection *each)
{
    if (each->state == CLOSED)
        return;
    net_drop(each->loop->epoll, &each->source);
    each->state = CLOSED;
    each->deadline = INT64_MAX;
    atomic_fetch_sub(&each->loop->tcp->served, 1);
}

static void connection_free(connection *each)
{
    if (each->memory)
        pd_release(each->memory);
    free(each->pieces);
    free(each);
}

/* Why a request cannot be served, in `words`; PD_DONE: it can, and `memory` is held for it. */
static pd_status judge(connection *each)
{
    grants *all = &each->loop->tcp->grants;
    const request *asked = &each->in.request;
    pd_status status = PD_DONE;
    pthread_mutex_lock(&all->lock);
    const grant *leased = grants_find(all, asked->number, asked->epoch);
    bool refused = !leased || !grant_opens(leased, asked->capability, asked->capability_bytes);
    for (uint32_t i = 0; i < asked->pieces && status != PD_ERROR; i++) {
        const wire_piece *wire = &each->pieces[i];
        pd_piece piece = {wire->grid, wire->offset, wire->bytes, wire->block, wire->blocks, NULL};
        status = grant_judge(leased, all->memory, &piece, each->words);
        refused |= status == PD_NOT_GRANTED;
    }
    if (status != PD_ERROR && refused) {
        status = PD_NOT_GRANTED;
        grant_refuse(leased, asked->number, asked->epoch, each->words);
    }
    if (status == PD_DONE)
        pd_retain(each->memory = all->memory);
    pthread_mutex_unlock(&all->lock);
    return status;
}

/* Can such a request be? Its pieces are there when `whole`. */
static bool plausible(const connection *each, bool whole)
{
    const request *asked = &each->in.request;
    if (!asked->pieces || asked->pieces > PD_SLICE_PIECES || !asked->bytes || asked->bytes > PD_SLICE_BYTES ||
        asked->capability_bytes > PD_MAX_CAPABILITY || asked->reserved)
        return false;
    uint64_t total = 0;
    for (uint32_t i = 0; whole && i < asked->pieces; i++) {
        const wire_piece *piece = &each->pieces[i];
        if (!piece->bytes || !piece->blocks || piece->bytes > PD_SLICE_BYTES || piece->blocks > PD_SLICE_BYTES)
            return false;
        total += piece->bytes * piece->blocks;
    }
    return !whole || total == asked->bytes;
}

/* The next segments of the answer's blocks, from its cursor on. */
static size_t segments(const connection *each, struct iovec *vector, size_t room)
{
    size_t count = 0, piece = each->piece;
    uint32_t block = each->block;
    uint64_t byte = each->byte;
    for (; piece < each->in.request.pieces && count < room; piece++, block = 0) {
        const wire_piece *wire = &each->pieces[piece];
        const pd_grid *grid = &each->memory->grids[wire->grid];
        unsigned char *base = (unsigned char *)(uintptr_t)each->memory->regions[grid->region].address + grid->offset + wire->offset;
        bool one_stretch = grid->block_stride == wire->bytes;
        for (; block < wire->blocks && count < room; byte = 0) {
            unsigned char *at = base + ((uint64_t)wire->block + block) * grid->block_stride + byte;
            uint32_t blocks = one_stretch ? wire->blocks - block : 1;
            vector[count++] = (struct iovec){at, blocks * wire->bytes - byte};
            block += blocks;
        }
        if (block < wire->blocks)
            break;
    }
    return count;
}

static void forward(connection *each, size_t sent)
{
    size_t head = sizeof each->head - each->head_at, step = sent < head ? sent : head;
    each->head_at += step;
    sent -= step;
    each->left -= (uint32_t)sent;
    while (each->memory && sent) {
        const wire_piece *wire = &each->pieces[each->piece];
        uint64_t rest = wire->bytes - each->byte;
        step = sent < rest ? sent : rest;
        each->byte += step;
        sent -= step;
        if (step < rest)
            continue;
        /* Whole blocks at once, for there may be many small ones. */
        uint64_t blocks = 1 + sent / wire->bytes, most = wire->blocks - each->block;
        blocks = blocks < most ? blocks : most;
        sent -= (blocks - 1) * wire->bytes;
        each->byte = 0;
        each->block += (uint32_t)blocks;
        if (each->block == wire->blocks)
            each->block = 0, each->piece++;
    }
}

static void send_answer(connection *each)
{
    while (each->head_at < sizeof each->head || each->left) {
        struct iovec vector[TCP_IOVECS];
        size_t count = 0;
        if (each->head_at < sizeof each->head)
            vector[count++] = (struct iovec){(char *)&each->head + each->head_at, sizeof each->head - each->head_at};
        if (each->memory)
            count += segments(each, vector + count, TCP_IOVECS - count);
        else if (each->left)
            vector[count++] = (struct iovec){each->words + each->head.bytes - each->left, each->left};
        struct msghdr message = {.msg_iov = vector, .msg_iovlen = count};
        ssize_t sent = sendmsg(each->source.fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN) {
            if (!each->writing)
                net_watch(each->loop->epoll, &each->source, true, true);
            each->writing = true;
            return;
        }
        if (sent < 0) {
            hang_up(each);
            return;
        }
        each->deadline = net_now_ms() + NET_PATIENCE_MS;
        forward(each, (size_t)sent);
    }
    if (each->writing)
        net_watch(each->loop->epoll, &each->source, false, true);
    each->writing = false;
    if (each->memory)
        pd_release(each->memory);
    each->memory = NULL;
    each->state = REQUEST;
    each->deadline = INT64_MAX;
}

static void start_answer(connection *each)
{
    pd_status status = judge(each);
    each->left = status == PD_DONE ? each->in.request.bytes : (uint32_t)strlen(each->words);
    each->head = (answer){each->in.request.serial, status, each->left};
    each->head_at = each->piece = each->block = each->byte = 0;
    each->state = ANSWER;
    each->got = 0;
    send_answer(each);
}

static void greet(connection *each)
{
    greeting mine;
    memcpy(mine.magic, tcp_magic, sizeof tcp_magic);
    memcpy(mine.instance, each->loop->tcp->instance, TCP_INSTANCE);
    bool speaks = !memcmp(each->in.greeting.magic, tcp_magic, sizeof tcp_magic);
    bool means_us = !memcmp(each->in.greeting.instance, mine.instance, TCP_INSTANCE);
    /* Also when another was meant: the reader tells by the instance. A new connection has room for these few bytes. */
    bool told = speaks && send(each->source.fd, &mine, sizeof mine, MSG_NOSIGNAL) == sizeof mine;
    each->pieces = told && means_us ? malloc(PD_SLICE_PIECES * sizeof *each->pieces) : NULL;
    if (!each->pieces) {
        hang_up(each);
        return;
    }
    each->state = REQUEST;
    each->got = 0;
    each->deadline = INT64_MAX;
}

/* All of what the state waited for is there. */
static void arrived(connection *each)
{
    each->got = 0;
    if (each->state == GREETING)
        greet(each);
    else if (!plausible(each, each->state == PIECES))
        hang_up(each);
    else if (each->state == REQUEST)
        each->state = PIECES;
    else
        start_answer(each);
}

static void connection_ready(source *self, uint32_t events)
{
    connection *each = (connection *)self;
    if (each->state == ANSWER && events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
        send_answer(each);
    for (int turns = 0; turns < 16 && each->state < ANSWER; turns++) { /* then the others have their turn */
        size_t whole = each->state == GREETING  ? sizeof(greeting)
                       : each->state == REQUEST ? sizeof(request)
                                                : each->in.request.pieces * sizeof(wire_piece);
        unsigned char *to = each->state == PIECES ? (unsigned char *)each->pieces : each->in.bytes;
        ssize_t got = recv(each->source.fd, to + each->got, whole - each->got, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return;
        if (got <= 0) {
            hang_up(each);
            return;
        }
        if (each->state != GREETING)
            each->deadline = net_now_ms() + NET_PATIENCE_MS;
        each->got += (size_t)got;
        if (each->got == whole)
            arrived(each);
    }
}

/* --- listening ---------------------------------------------------------------------------------------------------- */

static void accept_ready(source *self, uint32_t events)
{
    (void)events;
    tcp *all = (tcp *)((char *)self - offsetof(tcp, listener));
    int fd = net_accept(self->fd, &all->spare);
    if (fd < 0)
        return;
    connection *made = atomic_load(&all->served) < TCP_CONNECTIONS ? calloc(1, sizeof *made) : NULL;
    if (!made) {
        close(fd);
        return;
    }
    net_tune(fd);
    atomic_fetch_add(&all->served, 1);
    loop *each = &all->loops[all->next_loop++ % (unsigned)all->num_loops];
    made->source = (source){connection_ready, fd};
    made->loop = each;
    made->deadline = net_now_ms() + TCP_GREETING_MS;
    pthread_mutex_lock(&each->lock);
    made->next = each->new_connections;
    each->new_connections = made;
    pthread_mutex_unlock(&each->lock);
    tcp_wake(all);
}

int tcp_listen(tcp *all, const pd_options *options)
{
    memcpy(all->where.magic, tcp_magic, sizeof tcp_magic);
    memcpy(all->where.instance, all->instance, TCP_INSTANCE);
    int fd = net_listen(options, &all->where.at);
    if (fd < 0)
        return fd;
    all->listener = (source){accept_ready, fd};
    net_watch(all->loops[0].epoll, &all->listener, false, false);
    return 0;
}

/* --- the loop's calls --------------------------------------------------------------------------------------------- */

void connections_turn(loop *each)
{
    pthread_mutex_lock(&each->lock);
    connection *fresh = each->new_connections;
    each->new_connections = NULL;
    pthread_mutex_unlock(&each->lock);
    while (fresh) {
        connection *one = fresh;
        fresh = one->next;
        one->next = each->connections;
        each->connections = one;
        net_watch(each->epoll, &one->source, false, false);
    }
    int64_t now = net_now_ms();
    for (connection **at = &each->connections; *at;) {
        connection *one = *at;
        if (one->deadline <= now)
            hang_up(one);
        if (one->state == CLOSED) {
            *at = one->next;
            connection_free(one);
        } else {
            at = &one->next;
        }
    }
}

/* After the thread. */
void connections_close(loop *each)
{
    for (connection **list = &each->new_connections;; list = &each->connections) {
        while (*list) {
            connection *one = *list;
            *list = one->next;
            hang_up(one);
            connection_free(one);
        }
        if (list == &each->connections)
            return;
    }
}

int64_t connections_deadline(const loop *each)
{
    int64_t first = INT64_MAX;
    for (const connection *one = each->connections; one; one = one->next)
        first = one->deadline < first ? one->deadline : first;
    return first;
}
