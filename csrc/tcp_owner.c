/* The owner's side of the tcp backend: the connections of readers. Nothing that a reader sent is believed: lengths are
 * bounded before they are used, addresses checked against the grids, blocks against the lease (tcp_grants.c). */

#include "tcp.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
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
    tcp_drop(each->loop, &each->source);
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
    tcp *all = each->loop->tcp;
    const request *asked = &each->in.request;
    pd_status status = PD_DONE;
    char *words = each->words;
    size_t room = sizeof each->words;
    pthread_mutex_lock(&all->lock);
    const grant *leased = grant_find(all, asked->number, asked->epoch);
    unsigned char wrong = leased ? (unsigned char)(leased->capability_bytes ^ asked->capability_bytes) : 0;
    for (size_t i = 0; leased && i < PD_MAX_CAPABILITY; i++) /* all of it, however soon it differs */
        wrong |= leased->capability[i] ^ asked->capability[i];
    for (uint32_t i = 0; i < asked->pieces && status == PD_DONE; i++) {
        const wire_piece *piece = &each->pieces[i];
        unsigned long long block = (unsigned long long)piece->block + piece->blocks - 1;
        size_t grids = all->memory ? all->memory->num_grids : 0;
        const pd_grid *grid = piece->grid < grids ? &all->memory->grids[piece->grid] : NULL;
        status = PD_ERROR;
        if (!grid)
            snprintf(words, room, "grid %llu does not exist, there are %zu", (unsigned long long)piece->grid, grids);
        else if (block >= grid->num_blocks)
            snprintf(words, room, "block %llu does not exist, grid %llu has %llu", block,
                     (unsigned long long)piece->grid, (unsigned long long)grid->num_blocks);
        else if (piece->bytes > grid->block_bytes || piece->offset > grid->block_bytes - piece->bytes)
            snprintf(words, room, "%llu bytes at %llu do not lie in the blocks of grid %llu (%llu bytes)",
                     (unsigned long long)piece->bytes, (unsigned long long)piece->offset,
                     (unsigned long long)piece->grid, (unsigned long long)grid->block_bytes);
        else
            status = PD_DONE;
        if (status == PD_DONE && leased)
            wrong |= !grant_covers(leased, grid->group, piece->block, piece->blocks);
    }
    unsigned long long number = asked->number, epoch = asked->epoch;
    if (status == PD_DONE && (!leased || wrong)) {
        status = PD_NOT_GRANTED;
        snprintf(words, room, leased ? "lease %llu epoch %llu does not cover this read"
                                     : "lease %llu epoch %llu is not granted here (not yet, or no longer)",
                 number, epoch);
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
                tcp_watch(each->loop, &each->source, true, true);
            each->writing = true;
            return;
        }
        if (sent < 0) {
            hang_up(each);
            return;
        }
        each->deadline = tcp_now_ms() + TCP_PATIENCE_MS;
        forward(each, (size_t)sent);
    }
    if (each->writing)
        tcp_watch(each->loop, &each->source, false, true);
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
            each->deadline = tcp_now_ms() + TCP_PATIENCE_MS;
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
    int fd = accept4(self->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0 && (errno == EMFILE || errno == ENFILE) && all->spare >= 0) {
        /* Else it would wait there for ever, and the loop would spin. */
        close(all->spare);
        int unserved = accept4(self->fd, NULL, NULL, SOCK_CLOEXEC);
        if (unserved >= 0)
            close(unserved);
        all->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
    if (fd < 0)
        return;
    connection *made = atomic_load(&all->served) < TCP_CONNECTIONS ? calloc(1, sizeof *made) : NULL;
    if (!made) {
        close(fd);
        return;
    }
    tcp_tune(fd);
    atomic_fetch_add(&all->served, 1);
    loop *each = &all->loops[all->next_loop++ % (unsigned)all->num_loops];
    made->source = (source){connection_ready, fd};
    made->loop = each;
    made->deadline = tcp_now_ms() + TCP_GREETING_MS;
    pthread_mutex_lock(&each->lock);
    made->next = each->new_connections;
    each->new_connections = made;
    pthread_mutex_unlock(&each->lock);
    tcp_wake(all);
}

static int parse_address(const char *text, int port, struct sockaddr_storage *out, tcp_where *where)
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

int tcp_listen(tcp *all, const pd_options *options)
{
    struct sockaddr_storage address, ignored;
    memcpy(all->where.magic, tcp_magic, sizeof tcp_magic);
    memcpy(all->where.instance, all->instance, TCP_INSTANCE);
    int error = parse_address(options->host, options->port, &address, &all->where), one = 1;
    socklen_t size = all->where.family == 4 ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    if (error)
        return error;
    int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    all->listener = (source){accept_ready, fd};
    if (fd >= 0)
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) || listen(fd, 128) ||
        getsockname(fd, (struct sockaddr *)&address, &size))
        return pd_fail(errno, "cannot listen at %s port %d: %s; choose another 'host' or 'port' (0 picks a free port)",
                       options->host, options->port, strerror(errno));
    all->where.port = ntohs(all->where.family == 4 ? ((struct sockaddr_in *)&address)->sin_port
                                                   : ((struct sockaddr_in6 *)&address)->sin6_port);
    tcp_watch(&all->loops[0], &all->listener, false, false);
    return parse_address(options->advertise, 0, &ignored, &all->where);
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
        tcp_watch(each, &one->source, false, false);
    }
    int64_t now = tcp_now_ms();
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
