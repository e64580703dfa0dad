/* What an owner leases to readers over tcp; see tcp.h. */

#include "tcp.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static void grant_free(grant *each)
{
    for (size_t i = 0; i < each->num_groups; i++)
        free(each->groups[i].ids);
    free(each);
}

void grants_free(tcp *all)
{
    for (size_t i = 0; i < all->grants.room; i++)
        for (grant *each = all->grants.entries[i].value, *next; each; each = next) {
            next = each->next;
            grant_free(each);
        }
    free(all->grants.entries);
}

grant *grant_find(tcp *all, uint64_t number, uint64_t epoch)
{
    grant *each = pd_table_get(&all->grants, number);
    while (each && each->epoch != epoch)
        each = each->next;
    return each;
}

static int ascending(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

/* Take a grant out of the table; NULL if there is none. Under the lock. */
static grant *take_out(tcp *all, uint64_t number, uint64_t epoch)
{
    grant *gone = grant_find(all, number, epoch);
    if (!gone)
        return NULL;
    grant *first = pd_table_remove(&all->grants, number);
    for (grant **at = &first; *at; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            break;
        }
    if (first)
        pd_table_put(&all->grants, number, first); /* there is room: one was removed */
    return gone;
}

void tcp_revoke(void *own, uint64_t number, uint64_t epoch)
{
    tcp *all = own;
    pthread_mutex_lock(&all->lock);
    grant *gone = take_out(all, number, epoch);
    pthread_mutex_unlock(&all->lock);
    if (gone)
        grant_free(gone);
}

int tcp_grant(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    tcp *all = own;
    grant *made = calloc(1, sizeof *made + num_groups * sizeof(group));
    if (!made)
        return pd_fail(ENOMEM, "no memory for a lease");
    made->epoch = lease->epoch;
    made->capability_bytes = lease->capability_bytes;
    memcpy(made->capability, lease->capability, lease->capability_bytes);
    for (size_t i = 0; i < num_groups; i++) {
        group *each = &made->groups[made->num_groups++];
        each->id = blocks[i].group;
        each->ids = malloc((blocks[i].count + 1) * sizeof *each->ids);
        if (!each->ids)
            return grant_free(made), pd_fail(ENOMEM, "no memory for a lease");
        if (blocks[i].count)
            memcpy(each->ids, blocks[i].ids, blocks[i].count * sizeof *each->ids);
        qsort(each->ids, blocks[i].count, sizeof *each->ids, ascending);
        for (size_t k = 0; k < blocks[i].count; k++)
            if (!each->count || each->ids[each->count - 1] != each->ids[k])
                each->ids[each->count++] = each->ids[k];
    }
    pthread_mutex_lock(&all->lock); /* once: a lease that grows while it is read is never gone in between */
    grant *before = take_out(all, lease->number, lease->epoch);
    made->next = pd_table_remove(&all->grants, lease->number);
    bool kept = pd_table_put(&all->grants, lease->number, made);
    pthread_mutex_unlock(&all->lock);
    if (before)
        grant_free(before);
    if (kept)
        return 0;
    grant_free(made); /* the older ones of this number are lost with it: refused, never served wrongly */
    return pd_fail(ENOMEM, "no memory for a lease");
}

bool grant_covers(const grant *each, uint32_t id, uint64_t first, uint64_t count)
{
    for (size_t i = 0; i < each->num_groups; i++) {
        const group *leased = &each->groups[i];
        if (leased->id != id)
            continue;
        size_t low = 0, high = leased->count;
        while (low < high) {
            size_t middle = (low + high) / 2;
            if (leased->ids[middle] < first)
                low = middle + 1;
            else
                high = middle;
        }
        /* Each id is there once, so `count` ids on from the first one is the last one, or one is missing. */
        return low < leased->count && leased->ids[low] == first && count <= leased->count - low &&
               leased->ids[low + count - 1] == first + count - 1;
    }
    return false;
}

int tcp_publish(void *own, pd_memory *memory)
{
    tcp *all = own;
    pd_retain(memory);
    pthread_mutex_lock(&all->lock);
    pd_memory *old = all->memory;
    all->memory = memory;
    pthread_mutex_unlock(&all->lock);
    if (old)
        pd_release(old);
    return 0;
}
