/* Registered memory, and plans: whether they fit it, and what comes next of them. */

#include "core.h"

#include <errno.h>
#include <string.h>

void pd_release(pd_memory *memory)
{
    if (memory && atomic_fetch_sub(&memory->refs, 1) == 1) {
        free(memory->regions);
        free(memory->grids);
        free(memory);
    }
}

void pd_retain(pd_memory *memory)
{
    atomic_fetch_add(&memory->refs, 1);
}

void *duplicate(const void *data, size_t count, size_t size)
{
    void *copy = calloc(count ? count : 1, size);
    if (copy && count)
        memcpy(copy, data, count * size);
    return copy;
}

pd_memory *memory_make(const pd_region *regions, size_t num_regions, const pd_grid *grids, size_t num_grids)
{
    pd_memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        return NULL;
    atomic_init(&memory->refs, 1);
    memory->num_regions = num_regions, memory->num_grids = num_grids;
    memory->regions = duplicate(regions, num_regions, sizeof *regions);
    memory->grids = duplicate(grids, num_grids, sizeof *grids);
    if (!memory->regions || !memory->grids) {
        pd_release(memory);
        return NULL;
    }
    return memory;
}

int check_grids(const pd_region *regions, size_t num_regions, const pd_grid *grids, size_t num_grids)
{
    for (size_t i = 0; i < num_grids; i++) {
        const pd_grid *grid = &grids[i];
        uint64_t last;
        if (grid->region >= num_regions || !grid->num_blocks || !grid->block_bytes ||
            grid->block_stride < grid->block_bytes || grid->num_blocks > UINT32_MAX ||
            __builtin_mul_overflow(grid->num_blocks - 1, grid->block_stride, &last) ||
            __builtin_add_overflow(last, grid->block_bytes, &last) ||
            __builtin_add_overflow(last, grid->offset, &last) || last > regions[grid->region].length)
            return pd_fail(EINVAL, "grid %zu does not lie in its region", i);
    }
    return 0;
}

/* Every destination byte lies in a block registered here, none is written twice by two runs as far as counting can tell,
 * and the source is one that some owner could have. The number of bytes goes to `total`. */
int check_plan(const pd_memory *memory, const op *read, uint64_t *total)
{
    uint64_t blocks = 0, last = 0, per_block = 0;
    for (size_t i = 0; i < read->num_runs; i++) {
        const pd_run *run = &read->runs[i];
        if (!run->count)
            return pd_fail(EINVAL, "a run of a plan has no blocks");
        if ((uint64_t)run->src_block + run->count > (uint64_t)UINT32_MAX + 1)
            return pd_fail(EINVAL, "a run of the plan ends beyond block 2**32-1 of its source");
        blocks += run->count;
        if ((uint64_t)run->dst_block + run->count > last)
            last = (uint64_t)run->dst_block + run->count;
    }
    for (size_t i = 0; i < read->num_patterns; i++) {
        const pd_pattern *pattern = &read->patterns[i];
        if (pattern->src_grid >= 1ull << 48 || pattern->src_offset >= 1ull << 48)
            return pd_fail(EINVAL, "a pattern of the plan has an impossible source grid or offset");
        if (!read->num_runs)
            continue;
        if (pattern->dst_grid >= memory->num_grids)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: grid %llu does not exist",
                           (unsigned long long)pattern->dst_grid);
        const pd_grid *grid = &memory->grids[pattern->dst_grid];
        if (!pattern->bytes || pattern->bytes > grid->block_bytes || pattern->dst_offset > grid->block_bytes - pattern->bytes)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: %llu bytes at %llu of a block of %llu",
                           (unsigned long long)pattern->bytes, (unsigned long long)pattern->dst_offset,
                           (unsigned long long)grid->block_bytes);
        if (last > grid->num_blocks)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: block %llu of grid %llu of %llu",
                           (unsigned long long)last - 1, (unsigned long long)pattern->dst_grid,
                           (unsigned long long)grid->num_blocks);
        if (blocks > grid->num_blocks)
            return pd_fail(EINVAL, "the plan writes %llu blocks into %llu: one is named twice", (unsigned long long)blocks,
                           (unsigned long long)grid->num_blocks);
        per_block += pattern->bytes;
    }
    *total = blocks * per_block;
    return 0;
}

/* The next slice of a read: its pieces, and their bytes as the return value; 0 when all of it was handed out. */
uint64_t cut(op *read, pd_piece *pieces, size_t *count)
{
    uint64_t total = 0;
    *count = 0;
    while (read->pattern < read->num_patterns && total < PD_SLICE_BYTES && *count < PD_SLICE_PIECES) {
        const pd_pattern *pattern = &read->patterns[read->pattern];
        const pd_run *run = &read->runs[read->run];
        const pd_grid *grid = &read->memory->grids[pattern->dst_grid];
        uint64_t room = PD_SLICE_BYTES - total, bytes = pattern->bytes - read->byte, blocks = 1;
        if (read->byte || bytes > room)
            bytes = bytes < room ? bytes : room;
        else if (grid->block_stride == bytes)
            blocks = run->count - read->block < room / bytes ? run->count - read->block : room / bytes;
        pieces[(*count)++] = (pd_piece){
            .grid = pattern->src_grid,
            .block = run->src_block + read->block,
            .blocks = blocks,
            .offset = pattern->src_offset + read->byte,
            .bytes = bytes,
            .dst = (unsigned char *)(uintptr_t)read->memory->regions[grid->region].address + grid->offset +
                   (run->dst_block + read->block) * grid->block_stride + pattern->dst_offset + read->byte,
        };
        total += bytes * blocks;
        read->byte += bytes;
        if (read->byte < pattern->bytes && blocks == 1)
            continue;
        read->byte = 0;
        read->block += blocks;
        if (read->block == run->count) {
            read->block = 0;
            if (++read->run == read->num_runs) {
                read->run = 0;
                read->pattern++;
            }
        }
    }
    return total;
}
