/* What an owner tells its readers: memory with its keys, and the blocks of a lease. */

#include "verbs.h"

#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* --- memory ------------------------------------------------------------------------------------------------------- */

static uint64_t chunks_of(uint64_t length, uint64_t chunk)
{
    return (length - 1) / chunk + 1;
}

bool memory_encode(const keys *of, int index, unsigned char **out, size_t *bytes)
{
    const pd_memory *memory = of->memory;
    verbs_memory head = {of->chunk, (uint32_t)memory->num_regions, (uint32_t)memory->num_grids, (uint32_t)of->num_chunks, 0};
    *bytes = sizeof head + head.num_regions * sizeof(verbs_region) + head.num_grids * sizeof(pd_grid) + head.num_keys * 4ull;
    unsigned char *at = *bytes <= VERBS_MESSAGE ? malloc(*bytes) : NULL;
    *out = at;
    if (!at)
        return false;
    memcpy(at, &head, sizeof head);
    at += sizeof head;
    for (size_t i = 0; i < memory->num_regions; i++, at += sizeof(verbs_region)) {
        verbs_region region = {memory->regions[i].address, memory->regions[i].length};
        memcpy(at, &region, sizeof region);
    }
    if (head.num_grids)
        memcpy(at, memory->grids, head.num_grids * sizeof(pd_grid));
    at += head.num_grids * sizeof(pd_grid);
    for (size_t i = 0; i < of->num_chunks; i++, at += 4)
        memcpy(at, &of->mrs[(size_t)index * of->num_chunks + i]->rkey, 4);
    return true;
}

void table_release(table *each)
{
    if (!each || --each->refs)
        return;
    pd_release(each->memory);
    free(each->first);
    free(each->keys);
    free(each);
}

/* Regions that do not wrap around, as many keys as they have chunks, grids inside them. */
static bool sound(const table *made, size_t num_keys)
{
    const pd_memory *memory = made->memory;
    uint64_t chunks = 0;
    for (size_t i = 0; i < memory->num_regions; i++) {
        const pd_region *region = &memory->regions[i];
        if (!region->length || region->address + region->length < region->address ||
            chunks_of(region->length, made->chunk) > num_keys - chunks)
            return false;
        made->first[i] = chunks;
        chunks += chunks_of(region->length, made->chunk);
    }
    return chunks == num_keys && !check_grids(memory->regions, memory->num_regions, memory->grids, memory->num_grids);
}

/* NULL: it makes no sense, or there is no memory for it. */
table *table_parse(const unsigned char *body, size_t bytes)
{
    verbs_memory head;
    if (bytes < sizeof head)
        return NULL;
    memcpy(&head, body, sizeof head);
    body += sizeof head, bytes -= sizeof head;
    if (!head.chunk || bytes != head.num_regions * (uint64_t)sizeof(verbs_region) +
                                    head.num_grids * (uint64_t)sizeof(pd_grid) + head.num_keys * 4ull)
        return NULL;
    pd_region *regions = calloc(head.num_regions + 1ull, sizeof *regions);
    table *made = calloc(1, sizeof *made);
    if (regions && made) {
        for (size_t i = 0; i < head.num_regions; i++) {
            verbs_region region;
            memcpy(&region, body + i * sizeof region, sizeof region);
            regions[i] = (pd_region){.address = region.address, .length = region.length, .fd = -1};
        }
        body += head.num_regions * sizeof(verbs_region);
        pd_grid *grids = duplicate(body, head.num_grids, sizeof *grids);
        made->refs = 1;
        made->chunk = head.chunk;
        made->memory = grids ? memory_make(regions, head.num_regions, grids, head.num_grids) : NULL;
        made->first = calloc(head.num_regions + 1ull, sizeof *made->first);
        made->keys = duplicate(body + head.num_grids * sizeof(pd_grid), head.num_keys, 4);
        free(grids);
        if (!made->memory || !made->first || !made->keys || !sound(made, head.num_keys)) {
            table_release(made);
            made = NULL;
        }
    } else {
        free(made);
        made = NULL;
    }
    free(regions);
    return made;
}

uint32_t table_key(const table *each, const pd_piece *piece, uint64_t at, uint64_t *bytes)
{
    size_t index = each->memory->grids[piece->grid].region;
    uint64_t inside = at - each->memory->regions[index].address, rest = each->chunk - inside % each->chunk;
    *bytes = *bytes < rest ? *bytes : rest;
    return each->keys[each->first[index] + inside / each->chunk];
}

/* --- leases ------------------------------------------------------------------------------------------------------- */

static size_t put(unsigned char *out, size_t at, uint32_t first, uint32_t second)
{
    uint32_t both[2] = {first, second};
    if (out)
        memcpy(out + at, both, sizeof both);
    return at + sizeof both;
}

/* Into `out`, or with NULL only how many bytes it takes. */
static size_t encode_groups(const grant *leased, unsigned char *out)
{
    size_t at = 0;
    for (size_t i = 0; i < leased->num_groups; i++) {
        const group *each = &leased->groups[i];
        size_t head = at;
        uint32_t runs = 0;
        at += 8;
        for (size_t k = 0, end; k < each->count; k = end, runs++) {
            for (end = k + 1; end < each->count && each->ids[end] == each->ids[end - 1] + 1;)
                end++;
            at = put(out, at, each->ids[k], (uint32_t)(end - k));
        }
        put(out, head, each->id, runs);
    }
    return at;
}

bool grant_encode(const grant *leased, unsigned char **out, size_t *bytes)
{
    *bytes = encode_groups(leased, NULL);
    *out = *bytes <= VERBS_MESSAGE - sizeof(verbs_answer) ? malloc(*bytes + 1) : NULL;
    if (*out)
        encode_groups(leased, *out);
    return *out;
}

/* The ids of `runs` runs, which must be ascending and no more than are `left`; NULL: they are not. */
static uint32_t *expand(const unsigned char *body, uint32_t runs, size_t *count, uint64_t *left)
{
    uint64_t total = 0, next = 0;
    for (uint32_t i = 0; i < runs; i++) {
        uint32_t run[2];
        memcpy(run, body + i * sizeof run, sizeof run);
        if (!run[1] || (i && run[0] < next) || (next = run[0] + (uint64_t)run[1]) > 1ull << 32)
            return NULL;
        total += run[1];
    }
    uint32_t *ids = total <= *left ? malloc((total + 1) * sizeof *ids) : NULL;
    *left -= ids ? total : 0;
    *count = 0;
    for (uint32_t i = 0; ids && i < runs; i++) {
        uint32_t run[2];
        memcpy(run, body + i * sizeof run, sizeof run);
        for (uint32_t k = 0; k < run[1]; k++)
            ids[(*count)++] = run[0] + k;
    }
    return ids;
}

grant *grant_parse(const unsigned char *body, size_t bytes, uint32_t groups)
{
    if (groups > bytes / 8)
        return NULL;
    uint64_t left = VERBS_BLOCKS;
    grant *made = calloc(1, sizeof *made + groups * sizeof(group));
    for (uint32_t i = 0; made && i < groups; i++) {
        uint32_t head[2] = {0, 0};
        bool fits = bytes >= sizeof head;
        if (fits)
            memcpy(head, body, sizeof head);
        fits = fits && head[1] <= (bytes - sizeof head) / 8;
        group *each = &made->groups[i];
        each->id = head[0];
        each->ids = fits ? expand(body + sizeof head, head[1], &each->count, &left) : NULL;
        made->num_groups++;
        if (!each->ids) {
            grant_free(made);
            return NULL;
        }
        body += sizeof head + head[1] * 8ull, bytes -= sizeof head + head[1] * 8ull;
    }
    if (made && bytes) {
        grant_free(made);
        return NULL;
    }
    return made;
}
