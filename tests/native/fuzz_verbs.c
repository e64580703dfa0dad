/* What peers tell over the connections of verbs, mutated, under the sanitizers: memory with its keys, and the blocks of a
 * lease. Whatever is accepted is used as a read would use it. Needs no device.
 *
 *     fuzz-verbs MESSAGES SEED */

#include "../../csrc/core.h"
#include "../../csrc/verbs.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REGIONS = 3, GRIDS = 4, ROOM = 4096 };

static uint64_t state;

static uint64_t draw(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545F4914F6CDD1Du;
}

/* Odd numbers are where bounds are. */
static uint64_t odd(void)
{
    static const uint64_t some[] = {0, 1, 2, 7, 4096, UINT32_MAX, 1ull << 40, 1ull << 63, UINT64_MAX - 1, UINT64_MAX};
    return draw() % 2 ? some[draw() % (sizeof some / sizeof *some)] : draw() >> draw() % 64;
}

static void mutate(unsigned char *body, size_t *bytes)
{
    for (uint64_t turns = draw() % 4; turns; turns--) {
        size_t at = draw() % (*bytes / 4 + 1) * 4;
        uint64_t value = odd();
        size_t width = draw() % 2 ? 4 : 8;
        if (draw() % 3 == 0 && at + 1 < *bytes)
            body[at] ^= (unsigned char)(1 << draw() % 8);
        else if (at + width <= *bytes)
            memcpy(body + at, &value, width);
    }
    if (draw() % 8 == 0)
        *bytes = draw() % (*bytes + 1);
}

static size_t make_memory(unsigned char *body)
{
    verbs_memory head = {1 << 16, REGIONS, GRIDS, 0, 0};
    verbs_region regions[REGIONS];
    pd_grid grids[GRIDS];
    bool wraps = draw() % 8 == 0; /* as many keys as chunks, if one counts beyond 2^64 */
    if (wraps)
        head.chunk = 1;
    for (int i = 0; i < REGIONS; i++) {
        regions[i] = (verbs_region){(uint64_t)(i + 1) << 32, 1 + draw() % (wraps ? 64 : 1 << 18)};
        if (wraps && i == 1)
            regions[i] = (verbs_region){0, UINT64_MAX};
        head.num_keys += (uint32_t)((regions[i].length - 1) / head.chunk + 1);
    }
    for (int i = 0; i < GRIDS; i++)
        grids[i] = (pd_grid){(uint32_t)i % REGIONS, 0, 0, 1, 1, 1 + draw() % (regions[i % REGIONS].length % UINT32_MAX + 1)};
    if (wraps)
        grids[1].offset = odd() >> 1;
    unsigned char *at = body;
    at = (unsigned char *)memcpy(at, &head, sizeof head) + sizeof head;
    at = (unsigned char *)memcpy(at, regions, sizeof regions) + sizeof regions;
    at = (unsigned char *)memcpy(at, grids, sizeof grids) + sizeof grids;
    memset(at, 7, head.num_keys * 4);
    return (size_t)(at - body) + head.num_keys * 4;
}

static size_t make_lease(unsigned char *body, uint32_t *groups)
{
    uint32_t words[64], count = 0;
    *groups = 1 + (uint32_t)(draw() % 3);
    for (uint32_t g = 0; g < *groups; g++) {
        uint32_t runs = (uint32_t)(draw() % 4), next = 0;
        words[count++] = g, words[count++] = runs;
        for (uint32_t i = 0; i < runs; i++) {
            words[count++] = next += (uint32_t)(draw() % 9);
            words[count++] = 1 + (uint32_t)(draw() % 5);
            next += words[count - 1];
        }
    }
    memcpy(body, words, count * 4);
    return count * 4;
}

/* A read of some of it, as far as its device would be asked. */
static uint64_t use(const table *told, const grant *leased)
{
    uint64_t sum = 0;
    for (int i = 0; i < 16 && told->memory->num_grids; i++) {
        pd_piece piece = {draw() % (GRIDS + 1), odd(), 1 + odd() % PD_SLICE_BYTES, (uint32_t)odd(),
                          1 + (uint32_t)(draw() % 64), (unsigned char *)(uintptr_t)4096};
        char words[PD_MAX_WORDS];
        if (grant_judge(leased, told->memory, &piece, words) != PD_DONE)
            continue;
        cursor at = {0, 0, 0};
        uint64_t src, dst, bytes;
        for (int turns = 0; turns < 200 && cursor_at(&at, told->memory, &piece, 1, &src, &dst, &bytes); turns++) {
            sum += table_key(told, &piece, src, &bytes);
            cursor_move(&at, &piece, bytes);
        }
    }
    return sum;
}

int main(int count, char **arguments)
{
    unsigned long messages = count > 1 ? strtoul(arguments[1], NULL, 10) : 100000, tables = 0, leases = 0;
    state = count > 2 ? strtoul(arguments[2], NULL, 10) * 2 + 1 : 1;
    uint64_t sum = 0;
    for (unsigned long i = 0; i < messages; i++) {
        unsigned char *memory = malloc(ROOM), *lease = malloc(ROOM);
        uint32_t groups;
        size_t memory_bytes = make_memory(memory), lease_bytes = make_lease(lease, &groups);
        mutate(memory, &memory_bytes);
        mutate(lease, &lease_bytes);
        if (draw() % 16 == 0)
            groups = (uint32_t)odd();
        memory = realloc(memory, memory_bytes + 1), lease = realloc(lease, lease_bytes + 1);
        table *told = table_parse(memory, memory_bytes);
        grant *leased = grant_parse(lease, lease_bytes, groups);
        if (told)
            sum += use(told, leased);
        tables += told != NULL, leases += leased != NULL;
        if (leased)
            grant_free(leased);
        table_release(told);
        free(memory);
        free(lease);
    }
    printf("fuzz_verbs: %lu messages, %lu tables and %lu leases accepted, %d\n", messages, tables, leases, (int)(sum % 2));
    return tables && leases ? 0 : 1;
}
