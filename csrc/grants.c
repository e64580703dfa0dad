/* Leases of an owner that serves readers; see grants.h. */

#include "grants.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void grant_free(grant *each)
{
    for (size_t i = 0; i < each->num_groups; i++)
        free(each->groups[i].ids);
    free(each);
}

void grants_open(grants *all)
{
    pthread_mutex_init(&all->lock, NULL);
}

void grants_close(grants *all)
{
    for (size_t i = 0; i < all->table.room; i++)
        for (grant *each = all->table.entries[i].value, *next; each; each = next) {
            next = each->next;
            grant_free(each);
        }
    free(all->table.entries);
    pd_release(all->memory);
    pthread_mutex_destroy(&all->lock);
}

grant *grants_find(grants *all, uint64_t number, uint64_t epoch)
{
    grant *each = pd_table_get(&all->table, number);
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
static grant *take_out(grants *all, uint64_t number, uint64_t epoch)
{
    grant *gone = grants_find(all, number, epoch);
    if (!gone)
        return NULL;
    grant *first = pd_table_remove(&all->table, number);
    for (grant **at = &first; *at; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            break;
        }
    if (first)
        pd_table_put(&all->table, number, first); /* there is room: one was removed */
    return gone;
}

void grants_revoke(grants *all, uint64_t number, uint64_t epoch)
{
    pthread_mutex_lock(&all->lock);
    grant *gone = take_out(all, number, epoch);
    pthread_mutex_unlock(&all->lock);
    if (gone)
        grant_free(gone);
}

/* NULL after pd_fail. */
static grant *grant_make(const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    grant *made = calloc(1, sizeof *made + num_groups * sizeof(group));
    if (!made)
        return pd_fail(ENOMEM, "no memory for a lease"), NULL;
    made->epoch = lease->epoch;
    made->capability_bytes = lease->capability_bytes;
    if (lease->capability_bytes)
        memcpy(made->capability, lease->capability, lease->capability_bytes);
    for (size_t i = 0; i < num_groups; i++) {
        group *each = &made->groups[made->num_groups++];
        each->id = blocks[i].group;
        each->ids = malloc((blocks[i].count + 1) * sizeof *each->ids);
        if (!each->ids)
            return grant_free(made), pd_fail(ENOMEM, "no memory for a lease"), NULL;
        if (blocks[i].count)
            memcpy(each->ids, blocks[i].ids, blocks[i].count * sizeof *each->ids);
        qsort(each->ids, blocks[i].count, sizeof *each->ids, ascending);
        for (size_t k = 0; k < blocks[i].count; k++)
            if (!each->count || each->ids[each->count - 1] != each->ids[k])
                each->ids[each->count++] = each->ids[k];
    }
    return made;
}

int grants_put(grants *all, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    grant *made = grant_make(lease, blocks, num_groups);
    if (!made)
        return -ENOMEM;
    pthread_mutex_lock(&all->lock); /* once: a lease that grows while it is read is never gone in between */
    grant *before = take_out(all, lease->number, lease->epoch);
    made->next = pd_table_remove(&all->table, lease->number);
    bool kept = pd_table_put(&all->table, lease->number, made);
    pthread_mutex_unlock(&all->lock);
    if (before)
        grant_free(before);
    if (kept)
        return 0;
    grant_free(made); /* the older ones of this number are lost with it: refused, never served wrongly */
    return pd_fail(ENOMEM, "no memory for a lease");
}

static bool covers(const grant *each, uint32_t id, uint64_t first, uint64_t count)
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

bool grant_opens(const grant *leased, const unsigned char *capability, size_t bytes)
{
    size_t wrong = leased->capability_bytes ^ bytes;
    for (size_t i = 0; i < PD_MAX_CAPABILITY; i++) /* all of it, however soon it differs */
        wrong |= leased->capability[i] ^ (i < bytes ? capability[i] : 0);
    return !wrong;
}

pd_status grant_judge(const grant *leased, const pd_memory *memory, const pd_piece *piece, char *words)
{
    unsigned long long block = (unsigned long long)piece->block + piece->blocks - 1;
    size_t grids = memory ? memory->num_grids : 0;
    const pd_grid *grid = piece->grid < grids ? &memory->grids[piece->grid] : NULL;
    if (!grid)
        snprintf(words, PD_MAX_WORDS, "grid %llu does not exist, there are %zu", (unsigned long long)piece->grid, grids);
    else if (block >= grid->num_blocks)
        snprintf(words, PD_MAX_WORDS, "block %llu does not exist, grid %llu has %llu", block,
                 (unsigned long long)piece->grid, (unsigned long long)grid->num_blocks);
    else if (piece->bytes > grid->block_bytes || piece->offset > grid->block_bytes - piece->bytes)
        snprintf(words, PD_MAX_WORDS, "%llu bytes at %llu do not lie in the blocks of grid %llu (%llu bytes)",
                 (unsigned long long)piece->bytes, (unsigned long long)piece->offset, (unsigned long long)piece->grid,
                 (unsigned long long)grid->block_bytes);
    else
        return !leased || covers(leased, grid->group, piece->block, piece->blocks) ? PD_DONE : PD_NOT_GRANTED;
    return PD_ERROR;
}

/* The same words for a wrong capability and for blocks of others. */
void grant_refuse(bool known, uint64_t number, uint64_t epoch, char *words)
{
    snprintf(words, PD_MAX_WORDS,
             known ? "lease %llu epoch %llu does not cover this read"
                   : "lease %llu epoch %llu is not granted here (not yet, or no longer)",
             (unsigned long long)number, (unsigned long long)epoch);
}

void grants_publish(grants *all, pd_memory *memory)
{
    pd_retain(memory);
    pthread_mutex_lock(&all->lock);
    pd_memory *old = all->memory;
    all->memory = memory;
    pthread_mutex_unlock(&all->lock);
    pd_release(old);
}
