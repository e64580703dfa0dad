/* The reader's side of the tcp backend: what happens on a lane. */

#include "tcp_lane.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

/* --- endings ------------------------------------------------------------------------------------------------------ */

static void drop_connection(lane *each)
{
    net_drop(each->loop->epoll, &each->source);
    each->state = CLOSED;
    each->deadline = INT64_MAX;
}

static void give_back(lane *each, pd_status status, const char *words)
{
    for (; each->count; each->count--, each->first = (each->first + 1) % TCP_DEPTH) {
        flight *one = &each->flights[each->first];
        if (one->taken)
            pd_give(each->loop->tcp->core, one->taken, status, words);
        one->taken = NULL;
    }
}

/* The peer is lost with all of its lanes. */
static void lose(lane *each, const char *words)
{
    drop_connection(each);
    if (!atomic_exchange(&each->peer->lost, true))
        pd_lost(each->loop->tcp->core, each->peer->number, words);
    give_back(each, PD_PEER_LOST, words);
    tcp_wake(each->loop->tcp);
}

static void lose_errno(lane *each, const char *what, int error)
{
    char words[PD_MAX_WORDS];
    snprintf(words, sizeof words, "%s: %s", what, error ? strerror(error) : "connection closed");
    lose(each, words);
}

/* --- connecting --------------------------------------------------------------------------------------------------- */

static void lane_ready(source *self, uint32_t events);

static void lane_connect(lane *each)
{
    each->source = (source){lane_ready, net_connect(&each->peer->where.at)};
    if (each->source.fd < 0) {
        lose_errno(each, "cannot be reached", -each->source.fd);
        return;
    }
    each->deadline = net_now_ms() + TCP_GREETING_MS;
    each->writing = true;
    net_watch(each->loop->epoll, &each->source, true, false);
}

static void flush(lane *each)
{
    if (!net_send(each->source.fd, each->out, each->out_bytes, &each->out_at)) {
        lose_errno(each, "lost", errno);
        return;
    }
    bool blocked = each->out_at < each->out_bytes;
    if (blocked != each->writing)
        net_watch(each->loop->epoll, &each->source, blocked, true);
    each->writing = blocked;
}

static void greet(lane *each)
{
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(each->source.fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        lose_errno(each, "cannot be reached", error);
        return;
    }
    greeting mine;
    memcpy(mine.magic, tcp_magic, sizeof tcp_magic);
    memcpy(mine.instance, each->peer->where.instance, TCP_INSTANCE);
    memcpy(each->out, &mine, sizeof mine);
    each->out_bytes = sizeof mine, each->out_at = 0;
    each->state = GREETING;
    flush(each);
}

static void greeted(lane *each)
{
    peer *owner = each->peer;
    if (memcmp(each->in.greeting.magic, tcp_magic, sizeof tcp_magic)) {
        lose(each, "it does not speak this version of tcp");
    } else if (memcmp(each->in.greeting.instance, owner->where.instance, TCP_INSTANCE)) {
        lose(each, "another agent listens at its address now");
    } else {
        each->state = OPEN;
        each->deadline = INT64_MAX;
        each->in_at = 0;
        if (atomic_fetch_sub(&owner->pending, 1) == 1)
            pd_dialled(each->loop->tcp->core, owner->number, PD_DONE, "");
    }
}

/* --- asking ------------------------------------------------------------------------------------------------------- */

/* Where a slice goes, neighbours merged. */
static bool take_off(flight *one, const pd_slice *slice)
{
    if (one->room < slice->count) {
        span *grown = realloc(one->spans, slice->count * sizeof *grown);
        if (!grown)
            return false;
        one->spans = grown, one->room = slice->count;
    }
    one->count = 0;
    one->bytes = (uint32_t)slice->bytes;
    for (size_t i = 0; i < slice->count; i++) {
        size_t bytes = slice->pieces[i].bytes * slice->pieces[i].blocks;
        span *last = one->count ? &one->spans[one->count - 1] : NULL;
        if (last && last->at + last->bytes == slice->pieces[i].dst)
            last->bytes += bytes;
        else
            one->spans[one->count++] = (span){slice->pieces[i].dst, bytes};
    }
    return true;
}

static void encode(lane *each, const pd_slice *slice, uint64_t serial)
{
    request head = {
        .serial = serial,
        .number = slice->lease->number,
        .epoch = slice->lease->epoch,
        .bytes = (uint32_t)slice->bytes,
        .pieces = (uint32_t)slice->count,
        .capability_bytes = (uint32_t)slice->lease->capability_bytes,
    };
    memcpy(head.capability, slice->lease->capability, slice->lease->capability_bytes);
    memcpy(each->out, &head, sizeof head);
    for (size_t i = 0; i < slice->count; i++) {
        const pd_piece *piece = &slice->pieces[i];
        wire_piece wire = {piece->grid, piece->offset, piece->bytes, piece->block, piece->blocks};
        memcpy(each->out + sizeof head + i * sizeof wire, &wire, sizeof wire);
    }
    each->out_bytes = sizeof head + slice->count * sizeof(wire_piece);
    each->out_at = 0;
}

static void ask(lane *each)
{
    tcp *all = each->loop->tcp;
    pd_slice slice;
    while (each->state == OPEN && each->count < TCP_DEPTH && each->out_at == each->out_bytes) {
        pd_taken *taken = pd_take(all->core, each->peer->number, each->loop->pieces, &slice);
        if (!taken)
            return;
        flight *one = &each->flights[(each->first + each->count) % TCP_DEPTH];
        if (!take_off(one, &slice)) {
            pd_give(all->core, taken, PD_ERROR, "no memory for a slice");
            continue;
        }
        if (!each->count)
            each->deadline = net_now_ms() + NET_PATIENCE_MS;
        one->taken = taken;
        one->serial = each->serial++;
        each->count++;
        encode(each, &slice, one->serial);
        flush(each);
    }
}

/* --- answers ------------------------------------------------------------------------------------------------------ */

/* Receive into the spans of a slice, into words or into nothing. 0: not now; -1: lost. */
static ssize_t receive(lane *each)
{
    struct iovec vector[TCP_IOVECS];
    size_t count = 0;
    const flight *one = &each->flights[each->first];
    if (!each->in_body) {
        size_t whole = each->state == GREETING ? sizeof(greeting) : sizeof(answer);
        vector[count++] = (struct iovec){each->in.bytes + each->in_at, whole - each->in_at};
    } else if (each->in.answer.status != PD_DONE) {
        vector[count++] = (struct iovec){each->words + each->in.answer.bytes - each->left, each->left};
    } else if (!one->taken) {
        size_t waste = sizeof each->loop->waste;
        vector[count++] = (struct iovec){each->loop->waste, each->left < waste ? each->left : waste};
    } else {
        for (size_t i = each->span, skip = each->span_at; i < one->count && count < TCP_IOVECS; i++, skip = 0)
            vector[count++] = (struct iovec){one->spans[i].at + skip, one->spans[i].bytes - skip};
    }
    struct msghdr message = {.msg_iov = vector, .msg_iovlen = count};
    ssize_t got = recvmsg(each->source.fd, &message, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0) {
        lose_errno(each, each->state == OPEN ? "lost" : "cannot be reached", got ? errno : 0);
        return -1;
    }
    return got;
}

static void finish(lane *each)
{
    flight *one = &each->flights[each->first];
    pd_status status = (pd_status)each->in.answer.status;
    if (one->taken)
        pd_give(each->loop->tcp->core, one->taken, status, status == PD_DONE ? "" : each->words);
    one->taken = NULL;
    each->first = (each->first + 1) % TCP_DEPTH;
    each->count--;
    each->in_body = false, each->in_at = 0;
    if (!each->count)
        each->deadline = INT64_MAX;
}

/* A whole head of an answer. */
static void open_body(lane *each)
{
    const answer *head = &each->in.answer;
    const flight *one = &each->flights[each->first];
    bool fine = each->count && head->serial == one->serial;
    if (fine && head->status == PD_DONE)
        fine = head->bytes == one->bytes;
    else
        fine = fine && (head->status == PD_NOT_GRANTED || head->status == PD_ERROR) && head->bytes < PD_MAX_WORDS;
    if (!fine) {
        lose(each, "it broke the protocol: an answer that nobody asked for");
        return;
    }
    memset(each->words, 0, sizeof each->words);
    each->in_body = true;
    each->left = head->bytes;
    each->span = each->span_at = 0;
    if (!each->left)
        finish(each);
}

static void advance(lane *each, size_t got)
{
    each->left -= (uint32_t)got;
    const flight *one = &each->flights[each->first];
    for (; each->in.answer.status == PD_DONE && one->taken && got;) {
        size_t rest = one->spans[each->span].bytes - each->span_at, step = got < rest ? got : rest;
        got -= step;
        each->span_at += step;
        if (step == rest)
            each->span++, each->span_at = 0;
    }
    if (!each->left)
        finish(each);
}

/* Sleep until a good part of what must come is there: fewer wake-ups. */
static void doze(lane *each)
{
    size_t whole = each->state == GREETING ? sizeof(greeting) : sizeof(answer);
    size_t due = each->in_body ? each->left : whole - each->in_at;
    int least = due < TCP_BATCH ? (int)due : TCP_BATCH;
    if (least != each->least)
        setsockopt(each->source.fd, SOL_SOCKET, SO_RCVLOWAT, &least, sizeof least);
    each->least = least;
}

static void take_in(lane *each)
{
    for (int turns = 0; each->state != CLOSED && turns < 16; turns++) { /* then the others have their turn */
        ssize_t got = receive(each);
        if (got < 0)
            return;
        if (!got)
            break;
        each->deadline = net_now_ms() + NET_PATIENCE_MS;
        if (each->in_body) {
            advance(each, (size_t)got);
        } else {
            each->in_at += (size_t)got;
            if (each->state == GREETING && each->in_at == sizeof(greeting))
                greeted(each);
            else if (each->state == OPEN && each->in_at == sizeof(answer))
                open_body(each);
        }
    }
    if (each->state != CLOSED)
        doze(each);
}

static void lane_ready(source *self, uint32_t events)
{
    lane *each = (lane *)self;
    if (each->state == CONNECTING && events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
        greet(each);
    else if (each->state != CLOSED && events & EPOLLOUT)
        flush(each);
    if (each->state != CLOSED && events & (EPOLLIN | EPOLLERR | EPOLLHUP))
        take_in(each);
}

/* --- the loop's calls --------------------------------------------------------------------------------------------- */

/* Give back what nobody waits for; its bytes still come and go to waste. */
static void waive(lane *each)
{
    tcp *all = each->loop->tcp;
    for (unsigned i = 0; i < each->count; i++) {
        flight *one = &each->flights[(each->first + i) % TCP_DEPTH];
        if (one->taken && !pd_wanted(all->core, one->taken)) {
            pd_give(all->core, one->taken, PD_CANCELLED, "");
            one->taken = NULL;
        }
    }
}

void lanes_turn(loop *each, bool woken)
{
    pthread_mutex_lock(&each->lock);
    lane *fresh = each->new_lanes;
    each->new_lanes = NULL;
    pthread_mutex_unlock(&each->lock);
    while (fresh) {
        lane *one = fresh;
        fresh = one->next;
        one->next = each->lanes;
        each->lanes = one;
        lane_connect(one);
    }
    int64_t now = net_now_ms();
    for (lane **at = &each->lanes; *at;) {
        lane *one = *at;
        if (woken)
            waive(one);
        if (one->state == OPEN && one->deadline <= now)
            take_in(one); /* less may have come than doze waits for */
        if (one->state != CLOSED && one->deadline <= now)
            lose(one, one->state == OPEN ? "it sent nothing for 15 s" : "it did not answer within 10 s");
        if (one->state != CLOSED && (atomic_load(&one->peer->lost) || atomic_load(&one->peer->gone)))
            drop_connection(one);
        if (one->state == CLOSED)
            give_back(one, PD_PEER_LOST, "lost");
        if (one->state == CLOSED && (atomic_load(&one->peer->gone) || atomic_load(&one->peer->lost))) {
            *at = one->next;
            peer_unref(one->peer);
            lane_free(one);
            continue;
        }
        ask(one);
        at = &one->next;
    }
}

/* After the thread. */
void lanes_close(loop *each)
{
    for (lane **list = &each->new_lanes;; list = &each->lanes) {
        while (*list) {
            lane *one = *list;
            *list = one->next;
            drop_connection(one);
            give_back(one, PD_CANCELLED, "closed");
            peer_unref(one->peer);
            lane_free(one);
        }
        if (list == &each->lanes)
            return;
    }
}

int64_t lanes_deadline(const loop *each)
{
    int64_t first = INT64_MAX;
    for (const lane *one = each->lanes; one; one = one->next)
        first = one->deadline < first ? one->deadline : first;
    return first;
}
