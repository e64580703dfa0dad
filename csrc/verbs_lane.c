/* The reader's side of the verbs backend: what happens on a lane; see verbs_lane.h. */

#include "verbs_lane.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>

/* --- what comes --------------------------------------------------------------------------------------------------- */

static void landed(queue *self, void *what, bool whole)
{
    lane *each = (lane *)((char *)self - offsetof(lane, queue));
    flight *one = what;
    each->progress = net_now_ms();
    if (!one && whole && each->state == TRYING) {
        const unsigned char *found = each->rail->scratch + each->place * VERBS_INSTANCE;
        bool right = !memcmp(found, each->peer->where.instance, VERBS_INSTANCE);
        if (!right)
            lane_fail(each, "another agent's memory was read at its address");
        each->deadline = right ? INT64_MAX : each->deadline;
        each->state = right ? OPEN : each->state;
        atomic_fetch_add(&each->peer->verbs->counts.lanes, right);
    }
    if (!one || !whole)
        return; /* the queue is broken: lane_turn sees to it */
    one->under_way--;
    flight_settle(each, one);
}

static flight *with_serial(lane *each, uint64_t serial)
{
    flight *one = each->flights;
    while (one && !(one->under_way && one->serial == serial))
        one = one->next;
    return one;
}

static void arrived(queue *self, uint32_t serial)
{
    lane *each = (lane *)((char *)self - offsetof(lane, queue));
    flight *one = with_serial(each, serial);
    each->progress = net_now_ms();
    if (one)
        flight_end(each, one, PD_DONE, "");
}

/* Read the owner's instance out of its memory: whether the way is open, and leads to whom we mean. */
static void try_way(lane *each)
{
    const verbs_joined *joined = &each->joined;
    verbs *all = each->peer->verbs;
    each->place = 1 + (uint32_t)(++all->next_serial % (VERBS_SCRATCH - 1));
    uint64_t here = (uintptr_t)(each->rail->scratch + each->place * VERBS_INSTANCE);
    memset((void *)(uintptr_t)here, 0, VERBS_INSTANCE);
    ib_sge place = {here, VERBS_INSTANCE, each->rail->scratch_mr->lkey};
    ib_send_wr request = {
        .sg_list = &place, .num_sge = 1, .opcode = IB_WR_RDMA_READ, .rdma = {joined->token, joined->token_key, {0}}};
    each->state = TRYING;
    queue_receive(&each->queue, all->settings.write ? 2 * VERBS_DEPTH : 0);
    if (queue_post(&each->queue, &request, 1, NULL))
        lane_fail(each, each->queue.words);
}

static bool take_answer(lane *each, const unsigned char *body, size_t bytes)
{
    verbs_answer head;
    if (bytes < sizeof head)
        return false;
    memcpy(&head, body, sizeof head);
    body += sizeof head, bytes -= sizeof head;
    bool fine = head.status == PD_DONE || head.status == PD_NOT_GRANTED || head.status == PD_ERROR;
    char words[PD_MAX_WORDS] = "";
    if (head.status != PD_DONE)
        memcpy(words, body, bytes < sizeof words - 1 ? bytes : sizeof words - 1);
    each->progress = net_now_ms();
    permit *asked = each->permits;
    while (asked && asked->serial != head.serial)
        asked = asked->next;
    flight *one = with_serial(each, head.serial);
    if (asked && !asked->answered && fine) {
        asked->status = (pd_status)head.status;
        asked->leased = head.status == PD_DONE ? grant_parse(body, bytes, head.groups) : NULL;
        asked->answered = true;
        memcpy(asked->words, words, sizeof words);
        return asked->leased || head.status != PD_DONE;
    }
    if (one && each->peer->verbs->settings.write && fine && head.status != PD_DONE)
        flight_end(each, one, (pd_status)head.status, words);
    return fine; /* an answer that nobody waits for any more is none too many */
}

static bool take_message(lane *each)
{
    const wire *from = &each->wire;
    const unsigned char *body = from->in;
    size_t bytes = from->head.bytes;
    char words[PD_MAX_WORDS] = "";
    switch (from->head.kind) {
    case JOINED:
        if (each->state != JOINING || !each->table || bytes != sizeof each->joined || each->queue.joining != NOT_JOINED)
            return false;
        memcpy(&each->joined, body, sizeof each->joined);
        if (each->joined.end.reads > each->queue.end.reads)
            return false;
        queue_join(&each->queue, &each->joined.end);
        return true;
    case REFUSED:
        if (each->state != JOINING || bytes >= PD_MAX_WORDS)
            return false;
        memcpy(words, body, bytes);
        lane_fail(each, words);
        return true;
    case MEMORY:
        table_release(each->table); /* flights have references of their own */
        each->table = table_parse(body, bytes);
        return each->table;
    case ANSWER:
        return each->state == OPEN && take_answer(each, body, bytes);
    default:
        return false;
    }
}

static void lane_ready(source *self, uint32_t events)
{
    lane *each = (lane *)self;
    if (each->state == DIALLING && events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(self->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        verbs_join hello = {.rail = each->remote, .end = each->queue.end};
        memcpy(hello.magic, verbs_magic, sizeof hello.magic);
        memcpy(hello.instance, each->peer->where.instance, VERBS_INSTANCE);
        char words[PD_MAX_WORDS];
        snprintf(words, sizeof words, "cannot be reached: %s", strerror(error ? error : EPIPE));
        each->state = JOINING;
        if (error || !wire_send(&each->wire, JOIN, &hello, sizeof hello, NULL, 0))
            lane_fail(each, words);
    } else if (events & EPOLLOUT && each->state < BREAKING && !wire_flush(&each->wire)) {
        lane_fail(each, "lost: the connection beside it broke");
    }
    for (int turns = 0, got; each->state > DIALLING && each->state < BREAKING && turns < 16; turns++) {
        got = wire_receive(&each->wire, VERBS_MESSAGE);
        if (!got)
            return;
        int error = errno;
        char words[PD_MAX_WORDS];
        snprintf(words, sizeof words, "%s: %s", each->state == OPEN ? "lost" : "cannot be reached",
                 error ? strerror(error) : "connection closed");
        if (got < 0)
            lane_fail(each, words);
        else if (!take_message(each))
            lane_fail(each, "it broke the protocol of verbs");
    }
}

/* --- beginnings and ends ------------------------------------------------------------------------------------------ */

void lane_start(lane *each)
{
    verbs *all = each->peer->verbs;
    each->deadline = net_now_ms() + VERBS_GREETING_MS;
    each->words[0] = 0;
    each->fenced = false;
    char words[PD_MAX_WORDS];
    if (each->rail->down || queue_make(&each->queue, each->rail)) {
        snprintf(words, sizeof words, "%s", each->rail->down ? "the port here is down" : pd_last_error());
        lane_fail(each, words);
        return;
    }
    each->queue.landed = landed, each->queue.arrived = arrived;
    int fd = net_connect(&each->peer->where.at);
    if (fd < 0) {
        snprintf(words, sizeof words, "cannot be reached: %s", strerror(-fd));
        lane_fail(each, words);
        return;
    }
    each->state = DIALLING;
    wire_open(&each->wire, all->epoll, fd, lane_ready, true);
}

void lane_fail(lane *each, const char *words)
{
    if (each->state == BREAKING)
        return;
    atomic_fetch_add(&each->peer->verbs->counts.broken, each->state == OPEN);
    char whole[PD_MAX_WORDS]; /* `words` may be our own */
    bool named = !strncmp(words, each->rail->name, strlen(each->rail->name));
    snprintf(whole, sizeof whole, "%s%s%.*s", named ? "" : each->rail->name, named ? "" : ": ", PD_MAX_WORDS - 96, words);
    memcpy(each->words, whole, sizeof whole);
    each->state = BREAKING;
    each->deadline = net_now_ms() + VERBS_SETTLE_MS;
    if (each->queue.qp)
        queue_break(&each->queue);
    wire_close(&each->wire);
}

/* The device has finished with a queue pair that is removed: nothing of its flights writes any more. */
static void wind_up(lane *each)
{
    peer *owner = each->peer;
    if (each->queue.joining == TO_JOIN || !queue_free(&each->queue)) {
        each->deadline = net_now_ms() + VERBS_SETTLE_MS; /* its flights are kept: leaked rather than written over */
        return;
    }
    bool over = owner->lost || atomic_load(&owner->gone);
    for (flight *one; (one = each->flights);) {
        if (over || one->unwanted) {
            flight_end(each, one, over ? PD_PEER_LOST : PD_CANCELLED, each->words);
            continue;
        }
        flight_unlink(each, one);
        keys_release(one->keys);
        table_release(one->table);
        one->keys = NULL, one->table = NULL; /* of the next lane */
        one->next = owner->orphans;
        owner->orphans = one;
    }
    permits_drop(each);
    table_release(each->table);
    each->table = NULL;
    each->state = PAUSED;
    each->deadline = over ? INT64_MAX : net_now_ms() + (each->fenced ? 0 : VERBS_PAUSE_MS);
}

void lane_stop(lane *each, pd_status status, const char *words)
{
    wire_close(&each->wire);
    if (!queue_free(&each->queue))
        pd_abandon(each->peer->verbs->core);
    while (each->flights)
        flight_end(each, each->flights, status, words);
    permits_drop(each);
    table_release(each->table);
    each->table = NULL;
}

static void waive(lane *each, int64_t now)
{
    for (flight *one = each->flights, *next; one; one = next) {
        next = one->next;
        if (!one->unwanted && !pd_wanted(each->peer->verbs->core, one->taken))
            one->unwanted = now;
        if (one->unwanted)
            flight_settle(each, one);
    }
}

/* When an open lane breaks at the latest, unless something comes; and why. */
static int64_t patience(const lane *each, const char **why)
{
    int64_t first = INT64_MAX;
    for (const permit *one = each->permits; one; one = one->next)
        if (!one->answered && one->refs && one->asked + NET_PATIENCE_MS < first)
            first = one->asked + NET_PATIENCE_MS, *why = "it did not answer for 15 s";
    for (const flight *one = each->flights; one; one = one->next) {
        int64_t end = (one->asked ? one->asked : each->progress) + NET_PATIENCE_MS;
        if (end < first)
            first = end, *why = "nothing came for 15 s";
        if (one->unwanted && one->unwanted + VERBS_SETTLE_MS < first)
            first = one->unwanted + VERBS_SETTLE_MS, *why = NULL;
    }
    return first;
}

int64_t lane_deadline(const lane *each)
{
    const char *why;
    return each->state == OPEN ? patience(each, &why) : each->deadline;
}

static void check(lane *each, int64_t now)
{
    const char *why = "";
    if (each->rail->down)
        lane_fail(each, "the port here went down");
    else if (each->queue.joining == JOINED_ILL)
        lane_fail(each, each->queue.words);
    else if (each->queue.broken)
        lane_fail(each, each->queue.words[0] ? each->queue.words : "the queue pair broke");
    else if (each->state != OPEN && each->deadline <= now)
        lane_fail(each, "it did not answer within 10 s");
    else if (each->state == JOINING && each->queue.joining == JOINED_WELL)
        try_way(each);
    else if (each->state == OPEN && patience(each, &why) <= now) {
        each->fenced = !why;
        lane_fail(each, why ? why : "a read that nobody wants did not end within 1 s");
    }
}

void lane_turn(lane *each, bool woken)
{
    int64_t now = net_now_ms();
    bool over = each->peer->lost || atomic_load(&each->peer->gone);
    if (each->state == PAUSED && each->words[0] && !over && each->deadline > now && !each->rail->down && each->was_down)
        each->deadline = now; /* the port is back */
    each->was_down = each->rail->down;
    if (each->state == PAUSED && each->deadline <= now && !over)
        lane_start(each);
    if (woken)
        waive(each, now);
    if (each->state < BREAKING)
        check(each, now);
    if (each->state == BREAKING && (queue_quiet(&each->queue) || each->deadline <= now))
        wind_up(each);
    if (each->state != OPEN)
        return;
    if (!each->flights)
        each->progress = now;
    flights_advance(each);
    while (each->state == OPEN && each->count < VERBS_DEPTH && flight_next(each))
        flights_advance(each);
}
