/* The reader's side of the tcp backend: the owners it reads from; see tcp_lane.h. */

#include "tcp_lane.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int parse(const unsigned char *remote, size_t bytes, tcp_where *where)
{
    if (bytes != sizeof *where)
        return pd_fail(EPROTO, "the peer's description is not one of tcp");
    memcpy(where, remote, sizeof *where);
    if (memcmp(where->magic, tcp_magic, sizeof tcp_magic) || !net_valid(&where->at))
        return pd_fail(EPROTO, "the peer's description is not one of this version of tcp");
    return 0;
}

int tcp_can_reach(void *own, const unsigned char *remote, size_t bytes)
{
    (void)own;
    tcp_where where;
    return parse(remote, bytes, &where);
}

void peer_unref(peer *each)
{
    if (atomic_fetch_sub(&each->refs, 1) == 1)
        free(each);
}

void tcp_disconnect(void *own)
{
    peer *each = own;
    tcp *all = each->tcp;
    atomic_store(&each->gone, true);
    peer_unref(each);
    tcp_wake(all);
}

void lane_free(lane *each)
{
    for (size_t i = 0; i < TCP_DEPTH; i++)
        free(each->flights[i].spans);
    free(each);
}

void *tcp_dial(void *own, uint64_t number, const unsigned char *remote, size_t bytes)
{
    tcp *all = own;
    peer *made = calloc(1, sizeof *made);
    lane *lanes[TCP_LOOPS] = {NULL};
    if (!made || parse(remote, bytes, &made->where)) {
        free(made);
        return made ? NULL : (pd_fail(ENOMEM, "no memory"), NULL);
    }
    made->tcp = all;
    made->number = number;
    atomic_store(&made->refs, 1 + all->num_loops);
    atomic_store(&made->pending, all->num_loops);
    bool whole = true;
    for (int i = 0; i < all->num_loops; i++)
        whole &= (lanes[i] = calloc(1, sizeof(lane))) != NULL;
    if (!whole) {
        for (int i = 0; i < all->num_loops; i++)
            free(lanes[i]);
        free(made);
        return pd_fail(ENOMEM, "no memory for %d lanes", all->num_loops), NULL;
    }
    for (int i = 0; i < all->num_loops; i++) {
        loop *each = &all->loops[i];
        lanes[i]->peer = made, lanes[i]->loop = each;
        lanes[i]->source.fd = -1;
        lanes[i]->deadline = INT64_MAX;
        pthread_mutex_lock(&each->lock);
        lanes[i]->next = each->new_lanes;
        each->new_lanes = lanes[i];
        pthread_mutex_unlock(&each->lock);
    }
    tcp_wake(all);
    return made;
}
