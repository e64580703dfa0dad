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

/* Bytes from the first to behind the last of a pattern on each side, and those in between that it moves; false when they
 * are too many to be. */
static bool measure(const pd_pattern *pattern, uint64_t *src_span, uint64_t *dst_span, uint64_t *bytes)
{
    *src_span = *dst_span = *bytes = pattern->bytes;
    for (int i = 0; i < PD_DIMS; i++) {
        uint64_t count = pattern->dims[i].count, src, dst;
        if (!count || __builtin_mul_overflow(count - 1, pattern->dims[i].src_stride, &src) ||
            __builtin_mul_overflow(count - 1, pattern->dims[i].dst_stride, &dst) ||
            __builtin_add_overflow(*src_span, src, src_span) || __builtin_add_overflow(*dst_span, dst, dst_span) ||
            __builtin_mul_overflow(*bytes, count, bytes) || *bytes >= 1ull << 48 || *src_span >= 1ull << 48)
            return false;
    }
    return true;
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
        if (run->src_block + (run->count - 1ull) * read->src_step > UINT32_MAX)
            return pd_fail(EINVAL, "a run of the plan ends beyond block 2**32-1 of its source");
        blocks += run->count;
        if (run->dst_block + (run->count - 1ull) * read->dst_step + 1 > last)
            last = run->dst_block + (run->count - 1ull) * read->dst_step + 1;
    }
    for (size_t i = 0; i < read->num_patterns; i++) {
        const pd_pattern *pattern = &read->patterns[i];
        uint64_t src_span, dst_span, bytes;
        if (pattern->src_grid >= 1ull << 48 || pattern->src_offset >= 1ull << 48 ||
            !measure(pattern, &src_span, &dst_span, &bytes) || bytes > dst_span) /* more would be written over */
            return pd_fail(EINVAL, "a pattern of the plan has an impossible source grid, offset or dimension");
        if (!read->num_runs)
            continue;
        if (pattern->dst_grid >= memory->num_grids)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: grid %llu does not exist",
                           (unsigned long long)pattern->dst_grid);
        const pd_grid *grid = &memory->grids[pattern->dst_grid];
        if (memory->regions[grid->region].flags & PD_READ_ONLY)
            return pd_fail(EINVAL, "the plan writes to grid %llu, whose memory is read-only",
                           (unsigned long long)pattern->dst_grid);
        if (!pattern->bytes || dst_span > grid->block_bytes || pattern->dst_offset > grid->block_bytes - dst_span)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: %llu bytes at %llu of a block of %llu",
                           (unsigned long long)dst_span, (unsigned long long)pattern->dst_offset,
                           (unsigned long long)grid->block_bytes);
        if (last > grid->num_blocks)
            return pd_fail(EINVAL, "the plan does not fit the memory registered here: block %llu of grid %llu of %llu",
                           (unsigned long long)last - 1, (unsigned long long)pattern->dst_grid,
                           (unsigned long long)grid->num_blocks);
        if (blocks > grid->num_blocks)
            return pd_fail(EINVAL, "the plan writes %llu blocks into %llu: one is named twice", (unsigned long long)blocks,
                           (unsigned long long)grid->num_blocks);
        per_block += bytes;
    }
    *total = blocks * per_block;
    return 0;
}

/* --- slices ------------------------------------------------------------------------------------------------------- */

enum { DIRECT_BYTES = 2048 }; /* shorter runs cost more to ask for one by one than all that lies between them */

static uint64_t places(const pd_pattern *pattern)
{
    return pattern->dims[0].count * pattern->dims[1].count * pattern->dims[2].count;
}

/* How far on each side a place of the dimensions lies from the first. */
static void locate(const pd_pattern *pattern, uint64_t place, uint64_t *src, uint64_t *dst)
{
    *src = *dst = 0;
    for (int i = PD_DIMS - 1; place; i--) {
        uint64_t at = place % pattern->dims[i].count;
        place /= pattern->dims[i].count;
        *src += at * pattern->dims[i].src_stride, *dst += at * pattern->dims[i].dst_stride;
    }
}

/* Bytes of a source block to read at once for a pattern of short runs; 0: its runs are read one by one. */
static uint64_t span_of(const op *read, const pd_pattern *pattern)
{
    uint64_t src, dst, bytes;
    if (pattern->bytes >= DIRECT_BYTES || places(pattern) == 1)
        return 0;
    measure(pattern, &src, &dst, &bytes);
    return src <= read->slice_bytes ? src : 0;
}

static unsigned char *destination(const op *read, const pd_pattern *pattern)
{
    const pd_grid *grid = &read->memory->grids[pattern->dst_grid];
    uint64_t block = read->runs[read->run].dst_block + read->block * read->dst_step;
    return (unsigned char *)(uintptr_t)read->memory->regions[grid->region].address + grid->offset +
           block * grid->block_stride + pattern->dst_offset;
}

static void advance(op *read, uint64_t blocks)
{
    read->place = read->byte = 0;
    read->block += blocks;
    if (read->block < read->runs[read->run].count)
        return;
    read->block = 0;
    if (++read->run == read->num_runs) {
        read->run = 0;
        read->pattern++;
    }
}

static uint64_t cut_runs(op *read, pd_taken *taken, pd_piece *pieces, size_t *count)
{
    uint64_t total = 0;
    while (read->pattern < read->num_patterns && total < read->slice_bytes && *count < PD_SLICE_PIECES) {
        const pd_pattern *pattern = &read->patterns[read->pattern];
        const pd_run *run = &read->runs[read->run];
        if (span_of(read, pattern))
            break;
        uint64_t room = read->slice_bytes - total, bytes = pattern->bytes - read->byte, blocks = 1, src, dst;
        bool whole = !read->byte && bytes <= room, single = places(pattern) == 1;
        if (!whole && total && bytes <= read->slice_bytes)
            break; /* whole in the next slice: one operation less */
        if (!whole)
            bytes = bytes < room ? bytes : room;
        else if (single && read->src_step == 1 &&
                 read->memory->grids[pattern->dst_grid].block_stride * read->dst_step == bytes)
            blocks = run->count - read->block < room / bytes ? run->count - read->block : room / bytes;
        locate(pattern, read->place, &src, &dst);
        pieces[(*count)++] = (pd_piece){
            .grid = pattern->src_grid,
            .block = (uint32_t)(run->src_block + read->block * read->src_step),
            .blocks = (uint32_t)blocks,
            .offset = pattern->src_offset + src + read->byte,
            .bytes = bytes,
            .dst = destination(read, pattern) + dst + read->byte,
        };
        total += bytes * blocks;
        read->byte += bytes;
        if (read->byte < pattern->bytes && blocks == 1)
            continue;
        read->byte = 0;
        if (++read->place == places(pattern))
            advance(read, blocks);
    }
    taken->bytes = total;
    return total;
}

static uint64_t cut_spans(op *read, pd_taken *taken, pd_piece *pieces, size_t *count)
{
    uint64_t total = 0, span;
    taken->bytes = 0;
    while (read->pattern < read->num_patterns && taken->spans < PD_SLICE_PIECES) {
        const pd_pattern *pattern = &read->patterns[read->pattern];
        if (!(span = span_of(read, pattern)) || span > read->slice_bytes - total)
            break;
        uint32_t block = (uint32_t)(read->runs[read->run].src_block + read->block * read->src_step);
        pd_piece *last = *count ? &pieces[*count - 1] : NULL;
        if (last && last->grid == pattern->src_grid && last->offset == pattern->src_offset && last->bytes == span &&
            last->block + last->blocks == block)
            last->blocks++;
        else
            pieces[(*count)++] = (pd_piece){pattern->src_grid, pattern->src_offset, span, block, 1, taken->buffer + total};
        taken->span[taken->spans].pattern = pattern;
        taken->span[taken->spans++].dst = destination(read, pattern);
        taken->bytes += pattern->bytes * places(pattern);
        total += span;
        advance(read, 1);
    }
    return total;
}

/* The next slice of a read: its pieces, and their bytes as the return value; 0 without memory for a buffer. There is
 * something left to cut. */
uint64_t cut(pd_transport *transport, op *read, pd_taken *taken, pd_piece *pieces, size_t *count)
{
    *count = taken->spans = 0;
    if (!span_of(read, &read->patterns[read->pattern]))
        return cut_runs(read, taken, pieces, count);
    if (!taken->buffer)
        taken->buffer = transport->backend->buffer ? transport->backend->buffer(transport->own) : malloc(read->slice_bytes);
    if (!taken->buffer)
        return 0;
    return cut_spans(read, taken, pieces, count);
}

static pd_status copy_rows(pd_transport *transport, const pd_rows *rows, size_t count)
{
    if (transport->backend->place)
        return count ? transport->backend->place(transport->own, rows, count) : PD_DONE;
    for (const pd_rows *each = rows; each < rows + count; each++)
        for (uint64_t i = 0; i < each->count; i++)
            memcpy(each->dst + i * each->dst_stride, each->src + i * each->src_stride, each->bytes);
    return PD_DONE;
}

/* Put what came as spans in its places; anything but PD_DONE after pd_fail. */
pd_status scatter(pd_transport *transport, const pd_taken *taken)
{
    const pd_memory *memory = taken->read->memory;
    const unsigned char *from = taken->buffer;
    pd_rows rows[PD_MAX_ROWS];
    size_t count = 0;
    for (size_t i = 0; i < taken->spans; i++) {
        const pd_pattern *pattern = taken->span[i].pattern;
        uint64_t src, dst, bytes;
        uint32_t flags = memory->regions[memory->grids[pattern->dst_grid].region].flags;
        measure(pattern, &src, &dst, &bytes);
        for (uint64_t a = 0; a < pattern->dims[0].count; a++)
            for (uint64_t b = 0; b < pattern->dims[1].count; b++) {
                rows[count++] = (pd_rows){
                    .dst = taken->span[i].dst + a * pattern->dims[0].dst_stride + b * pattern->dims[1].dst_stride,
                    .src = from + a * pattern->dims[0].src_stride + b * pattern->dims[1].src_stride,
                    .dst_stride = pattern->dims[2].dst_stride,
                    .src_stride = pattern->dims[2].src_stride,
                    .bytes = pattern->bytes,
                    .count = pattern->dims[2].count,
                    .flags = flags,
                };
                if (count < PD_MAX_ROWS)
                    continue;
                pd_status status = copy_rows(transport, rows, count);
                if (status != PD_DONE)
                    return status;
                count = 0;
            }
        from += src;
    }
    return copy_rows(transport, rows, count);
}
