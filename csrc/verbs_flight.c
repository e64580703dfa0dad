/* The reader's side of the verbs backend: slices in flight on a lane, and leave to read them; see verbs_lane.h. */

#include "verbs_lane.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- permits ------------------------------------------------------------------------------------------------------ */

static void permit_free(lane *each, permit *gone)
{
    permit **at = &each->permits;
    while (*at != gone)
        at = &(*at)->next;
    *at = gone->next;
    if (gone->leased)
        grant_free(gone->leased);
    free(gone);
}

/* Of those that no flight has, the ones that were asked for first go. */
static void permit_release(lane *each, permit *used)
{
    if (!used || --used->refs)
        return;
    permit *oldest = NULL;
    int count = 0;
    for (permit *one = each->permits; one; one = one->next, count++)
        oldest = one->refs ? oldest : one;
    if (count > VERBS_PERMITS && oldest)
        permit_free(each, oldest);
}

void permits_drop(lane *each)
{
    while (each->permits)
        permit_free(each, each->permits);
}

/* The permit that a flight goes under; the owner is asked when there is none for its read. NULL without memory. */
static permit *permit_for(lane *each, const flight *one)
{
    permit *found = each->permits;
    while (found && (found->tag != one->tag || found->left < one->bytes))
        found = found->next;
    if (!found) {
        found = calloc(1, sizeof *found);
        if (!found)
            return NULL;
        found->tag = one->tag;
        found->serial = ++each->peer->verbs->next_serial;
        found->left = VERBS_ALLOWANCE;
        found->asked = net_now_ms();
        found->next = each->permits;
        each->permits = found;
        verbs_ask asked = {
            .serial = found->serial,
            .number = one->lease.number,
            .epoch = one->lease.epoch,
            .capability_bytes = (uint32_t)one->lease.capability_bytes,
        };
        memcpy(asked.capability, one->capability, sizeof asked.capability);
        atomic_fetch_add(&each->peer->verbs->counts.asks, 1);
        if (!wire_send(&each->wire, ASK, &asked, sizeof asked, NULL, 0))
            lane_fail(each, "the connection beside it broke");
    }
    found->left -= one->bytes;
    found->refs++;
    return found;
}

/* --- flights ------------------------------------------------------------------------------------------------------ */

void flight_give(verbs *all, flight *each, pd_status status, const char *words)
{
    if (status == PD_DONE && !gpu_flush(all))
        status = PD_ERROR, words = pd_last_error();
    pd_give(all->core, each->taken, status, words);
    keys_release(each->keys);
    table_release(each->table);
    each->next = all->spare_flights;
    all->spare_flights = each;
}

void flights_free(verbs *all)
{
    for (flight *gone; (gone = all->spare_flights);) {
        all->spare_flights = gone->next;
        free(gone);
    }
}

void flight_unlink(lane *each, flight *gone)
{
    flight **at = &each->flights;
    while (*at != gone)
        at = &(*at)->next;
    *at = gone->next;
    if (!*at)
        each->last = at;
    each->count--;
    permit_release(each, gone->permit);
    gone->permit = NULL;
}

void flight_end(lane *each, flight *one, pd_status status, const char *words)
{
    flight_unlink(each, one);
    flight_give(each->peer->verbs, one, status, words);
}

/* The next slice: one that another lane left, or one of the core's; NULL: there is none. */
flight *flight_next(lane *each)
{
    verbs *all = each->peer->verbs;
    flight *one = each->peer->orphans;
    if (one) {
        each->peer->orphans = one->next;
    } else {
        pd_slice slice;
        one = all->spare_flights ? all->spare_flights : malloc(sizeof *one);
        pd_taken *taken = one ? pd_take(all->core, each->peer->number, one->pieces, &slice) : NULL;
        if (one && one == all->spare_flights)
            all->spare_flights = one->next;
        if (!taken) {
            if (one)
                one->next = all->spare_flights, all->spare_flights = one;
            return NULL;
        }
        one->taken = taken;
        one->tag = slice.tag;
        one->lease = *slice.lease;
        one->count = slice.count;
        one->bytes = slice.bytes;
        memset(one->capability, 0, sizeof one->capability);
        memcpy(one->capability, slice.lease->capability, slice.lease->capability_bytes);
    }
    one->next = NULL;
    one->permit = NULL;
    one->next_piece = (cursor){0, 0, 0};
    one->under_way = 0;
    one->asked = 0;
    one->judged = one->posted = one->failed = false;
    one->unwanted = 0;
    one->keys = keys_hold(all);
    one->table = each->table;
    one->table->refs++;
    *each->last = one;
    each->last = &one->next;
    each->count++;
    return one;
}

/* Whether the owner's answer allows a flight; false: it has ended. */
static bool judge(lane *each, flight *one)
{
    const permit *given = one->permit;
    char words[PD_MAX_WORDS];
    pd_status status = PD_DONE;
    bool refused = given->status != PD_DONE;
    for (size_t i = 0; i < one->count && status != PD_ERROR; i++) {
        status = grant_judge(given->leased, one->table->memory, &one->pieces[i], words);
        refused |= status == PD_NOT_GRANTED;
    }
    one->judged = true;
    if (status != PD_ERROR && !refused)
        return true;
    if (status != PD_ERROR && given->status != PD_DONE)
        snprintf(words, sizeof words, "%s", given->words);
    else if (status != PD_ERROR)
        grant_refuse(true, one->lease.number, one->lease.epoch, words);
    flight_end(each, one, status == PD_ERROR ? PD_ERROR : PD_NOT_GRANTED, words);
    return false;
}

/* Ask the device for as much of a flight as there is room for. */
static void post_reads(lane *each, flight *one)
{
    verbs *all = each->peer->verbs;
    ib_send_wr requests[VERBS_BATCH];
    ib_sge places[VERBS_BATCH];
    while (!one->posted && each->queue.room && !each->queue.broken) {
        unsigned count = 0, most = each->queue.room < VERBS_BATCH ? each->queue.room : VERBS_BATCH;
        uint64_t src, dst, bytes, total = 0;
        while (count < most && cursor_at(&one->next_piece, one->table->memory, one->pieces, one->count, &src, &dst, &bytes)) {
            uint32_t key = table_key(one->table, &one->pieces[one->next_piece.piece], src, &bytes);
            const ib_mr *here = destination_find(all, one->keys, each->rail->index, dst, &bytes);
            if (!here)
                break;
            places[count] = (ib_sge){dst, (uint32_t)bytes, here->lkey};
            requests[count] = (ib_send_wr){
                .sg_list = &places[count], .num_sge = 1, .opcode = IB_WR_RDMA_READ, .rdma = {src, key, {0}}};
            cursor_move(&one->next_piece, one->pieces, bytes);
            total += bytes;
            count++;
        }
        one->posted = one->next_piece.piece == one->count;
        if (count && queue_post(&each->queue, requests, count, one))
            return;
        one->under_way += count != 0;
        atomic_fetch_add(&all->counts.requests, count);
        atomic_fetch_add(&all->counts.batches, count != 0);
        atomic_fetch_add(&all->counts.bytes, total);
        if (!count && !one->posted) {
            one->posted = one->failed = true; /* it ends when what is under way has */
            if (!one->under_way)
                flight_end(each, one, PD_ERROR, "its destination is not registered any more");
            return;
        }
    }
}

/* Ask the owner to write a flight here. */
static void post_write(lane *each, flight *one)
{
    verbs *all = each->peer->verbs;
    verbs_piece *list = all->list;
    verbs_ask asked = {
        .serial = one->serial = ++all->next_serial & 0xffffffff,
        .number = one->lease.number,
        .epoch = one->lease.epoch,
        .capability_bytes = (uint32_t)one->lease.capability_bytes,
    };
    memcpy(asked.capability, one->capability, sizeof asked.capability);
    bool fits = true;
    for (cursor at = {0, 0, 0}; fits && at.piece < one->count;) {
        const pd_piece *piece = &one->pieces[at.piece];
        uint64_t dst = (uintptr_t)piece->dst + at.block * piece->bytes + at.byte;
        /* Whole blocks as far as one key of ours goes, or the rest of a block. */
        uint64_t bytes = (piece->blocks - at.block) * piece->bytes - at.byte;
        const ib_mr *here = destination_find(all, one->keys, each->rail->index, dst, &bytes);
        uint64_t rest = piece->bytes - at.byte, blocks = at.byte || bytes < rest ? 1 : bytes / piece->bytes;
        bytes = at.byte || bytes < rest ? (bytes < rest ? bytes : rest) : blocks * piece->bytes;
        fits = here && asked.pieces < VERBS_PIECES;
        if (fits)
            list[asked.pieces++] = (verbs_piece){
                piece->grid, piece->offset + at.byte, bytes / blocks, dst, piece->block + at.block, (uint32_t)blocks, here->rkey, 0};
        cursor_move(&at, one->pieces, bytes);
    }
    one->posted = true;
    if (!fits)
        flight_end(each, one, PD_ERROR, "its destination is not registered any more, or is in too many parts");
    else if (!wire_send(&each->wire, WRITE, &asked, sizeof asked, list, asked.pieces * sizeof *list))
        lane_fail(each, "the connection beside it broke");
    else
        one->under_way = 1, one->asked = net_now_ms();
}

/* Nothing of it is under way and nothing more of it will be. */
void flight_settle(lane *each, flight *one)
{
    if (one->under_way || (!one->posted && !one->unwanted))
        return;
    if (one->failed)
        flight_end(each, one, PD_ERROR, "its destination is not registered any more");
    else
        flight_end(each, one, one->posted ? PD_DONE : PD_CANCELLED, "");
}

void flights_advance(lane *each)
{
    bool writes = each->peer->verbs->settings.write;
    for (flight *one = each->flights, *next; one && each->state == OPEN; one = next) {
        next = one->next;
        if (one->unwanted || one->posted)
            continue;
        if (writes) {
            post_write(each, one);
            continue;
        }
        if (!one->permit && !(one->permit = permit_for(each, one))) {
            flight_end(each, one, PD_ERROR, "no memory for a permit");
            continue;
        }
        if (each->state != OPEN || !one->permit->answered || (!one->judged && !judge(each, one)))
            continue;
        post_reads(each, one);
        if (each->queue.broken)
            lane_fail(each, each->queue.words);
    }
}
