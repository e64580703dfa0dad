/* The reader's side of the verbs backend: which rails lead to an owner, and what becomes of slices when one breaks. */

#include "verbs_lane.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int parse(const unsigned char *remote, size_t bytes, verbs_where *where)
{
    if (bytes != sizeof *where)
        return pd_fail(EPROTO, "the peer's description is not one of verbs");
    memcpy(where, remote, sizeof *where);
    if (memcmp(where->magic, verbs_magic, sizeof verbs_magic) || !net_valid(&where->at) || !where->num_rails ||
        where->num_rails > VERBS_RAILS)
        return pd_fail(EPROTO, "the peer's description is not one of this version of verbs");
    return 0;
}

/* Bits that two addresses have in common from the start: rails of one subnet share most. */
static int alike(const unsigned char *left, const unsigned char *right)
{
    for (int i = 0; i < 128; i++)
        if ((left[i / 8] ^ right[i / 8]) >> (7 - i % 8) & 1)
            return i;
    return 128;
}

static bool mapped_ipv4(const unsigned char *gid)
{
    static const unsigned char prefix[12] = {[10] = 0xff, [11] = 0xff};
    return !memcmp(gid, prefix, sizeof prefix);
}

static bool can_join(const verbs_port *here, const verbs_port *there)
{
    return here->link_layer == there->link_layer &&
           (here->link_layer != IB_LINK_ETHERNET || mapped_ipv4(here->gid) == mapped_ipv4(there->gid));
}

/* For each rail here the rail there that it reads over, -1: none. Each is used once at most. */
static int pair_up(const verbs *all, const verbs_where *where, int out[VERBS_RAILS])
{
    bool used[VERBS_RAILS] = {false};
    int pairs = 0;
    for (int i = 0; i < all->num_rails; i++) {
        int best = -1, most = -1;
        for (int k = 0; k < (int)where->num_rails; k++) {
            int common = alike(all->where.rails[i].gid, where->rails[k].gid);
            if (!used[k] && can_join(&all->where.rails[i], &where->rails[k]) && common > most)
                best = k, most = common;
        }
        out[i] = best;
        if (best >= 0)
            used[best] = true, pairs++;
    }
    return pairs;
}

int verbs_can_reach(void *own, const unsigned char *remote, size_t bytes)
{
    verbs *all = own;
    verbs_where where;
    int pairs[VERBS_RAILS], error = parse(remote, bytes, &where);
    if (!error && !pair_up(all, &where, pairs))
        return pd_fail(EHOSTUNREACH, "none of its %u RDMA ports is of the kind of ours (InfiniBand; RoCE over IPv4 or IPv6): "
                       "choose GIDs that match with 'devices'", where.num_rails);
    return error;
}

static void unref(peer *each)
{
    if (atomic_fetch_sub(&each->refs, 1) == 1)
        free(each);
}

void verbs_disconnect(void *own)
{
    peer *each = own;
    atomic_store(&each->gone, true);
    int bell = each->verbs->bell.fd;
    unref(each);
    net_ring(bell);
}

void *verbs_dial(void *own, uint64_t number, const unsigned char *remote, size_t bytes)
{
    verbs *all = own;
    verbs_where where;
    int pairs[VERBS_RAILS];
    if (parse(remote, bytes, &where))
        return NULL;
    int count = pair_up(all, &where, pairs) * (int)all->settings.queues;
    if (!count)
        return pd_fail(EHOSTUNREACH, "no rail leads there"), NULL;
    count = count < VERBS_LANES ? count : VERBS_LANES;
    peer *made = calloc(1, sizeof *made + (size_t)count * sizeof(lane));
    if (!made)
        return pd_fail(ENOMEM, "no memory for %d lanes", count), NULL;
    made->verbs = all;
    made->number = number;
    made->where = where;
    atomic_store(&made->refs, 2); /* the core's and ours */
    for (int i = 0; made->num_lanes < count; i = (i + 1) % all->num_rails) {
        if (pairs[i] < 0)
            continue;
        lane *each = &made->lanes[made->num_lanes++];
        each->peer = made;
        each->rail = &all->rails[i];
        each->remote = (uint32_t)pairs[i];
        each->state = PAUSED; /* due at once */
        each->wire.source.fd = -1;
        each->last = &each->flights;
    }
    pthread_mutex_lock(&all->lock);
    made->next = all->new_peers;
    all->new_peers = made;
    pthread_mutex_unlock(&all->lock);
    net_ring(all->bell.fd);
    return made;
}

/* --- the loop's calls --------------------------------------------------------------------------------------------- */

static void drop_orphans(peer *each, pd_status status, const char *words)
{
    for (flight *one; (one = each->orphans);) {
        each->orphans = one->next;
        flight_give(each->verbs, one, status, words);
    }
}

/* What nobody waits for any more. */
static void waive_orphans(peer *each)
{
    for (flight **at = &each->orphans, *one; (one = *at);) {
        if (pd_wanted(each->verbs->core, one->taken)) {
            at = &one->next;
            continue;
        }
        *at = one->next;
        flight_give(each->verbs, one, PD_CANCELLED, "");
    }
}

/* A peer without a lane that is open or may become so is lost. */
static void look_after(peer *each)
{
    int usable = 0;
    const lane *latest = &each->lanes[0];
    for (int i = 0; i < each->num_lanes; i++) {
        const lane *one = &each->lanes[i];
        usable += one->state < BREAKING || one->fenced || !one->words[0]; /* without words: not begun yet */
        if (one->words[0])
            latest = one;
    }
    if (!usable && !each->lost) {
        each->lost = true;
        pd_lost(each->verbs->core, each->number, latest->words);
    }
    bool open = false;
    for (int i = 0; i < each->num_lanes; i++)
        open |= each->lanes[i].state == OPEN;
    if (open && !each->dialled) {
        each->dialled = true;
        pd_dialled(each->verbs->core, each->number, PD_DONE, "");
    }
}

/* False: nothing of it is left. */
static bool peer_turn(peer *each, bool woken)
{
    bool over = each->lost || atomic_load(&each->gone), quiet = true;
    for (int i = 0; i < each->num_lanes; i++) {
        lane *one = &each->lanes[i];
        if (over && one->state < BREAKING)
            lane_fail(one, "its other lanes are gone");
        lane_turn(one, woken);
        quiet &= one->state == PAUSED;
    }
    if (!over)
        look_after(each);
    if (woken)
        waive_orphans(each);
    if (each->lost || atomic_load(&each->gone))
        drop_orphans(each, PD_PEER_LOST, "lost");
    return !(over && quiet);
}

void peers_turn(verbs *all, bool woken)
{
    pthread_mutex_lock(&all->lock);
    peer *fresh = all->new_peers;
    all->new_peers = NULL;
    pthread_mutex_unlock(&all->lock);
    while (fresh) {
        peer *one = fresh;
        fresh = one->next;
        one->next = all->peers;
        all->peers = one;
    }
    for (peer **at = &all->peers; *at;) {
        peer *one = *at;
        if (peer_turn(one, woken)) {
            at = &one->next;
        } else {
            *at = one->next;
            unref(one);
        }
    }
}

/* After the thread. */
void peers_close(verbs *all)
{
    for (peer **list = &all->new_peers;; list = &all->peers) {
        for (peer *one; (one = *list);) {
            *list = one->next;
            for (int i = 0; i < one->num_lanes; i++)
                lane_stop(&one->lanes[i], PD_CANCELLED, "closed");
            drop_orphans(one, PD_CANCELLED, "closed");
            unref(one);
        }
        if (list == &all->peers)
            return;
    }
}

int64_t peers_deadline(const verbs *all)
{
    int64_t first = INT64_MAX;
    for (const peer *one = all->peers; one; one = one->next)
        for (int i = 0; i < one->num_lanes; i++) {
            int64_t due = lane_deadline(&one->lanes[i]);
            first = due < first ? due : first;
        }
    return first;
}
