/* See pieces.h. */

#include "pieces.h"

bool cursor_at(const cursor *at, const pd_memory *memory, const pd_piece *pieces, size_t count, uint64_t *src,
               uint64_t *dst, uint64_t *bytes)
{
    if (at->piece == count)
        return false;
    const pd_piece *piece = &pieces[at->piece];
    const pd_grid *grid = &memory->grids[piece->grid];
    uint64_t blocks = grid->block_stride == piece->bytes ? piece->blocks - at->block : 1;
    *src = memory->regions[grid->region].address + grid->offset + (piece->block + (uint64_t)at->block) * grid->block_stride +
           piece->offset + at->byte;
    *dst = (uintptr_t)piece->dst + at->block * piece->bytes + at->byte;
    *bytes = blocks * piece->bytes - at->byte;
    return true;
}

void cursor_move(cursor *at, const pd_piece *pieces, uint64_t bytes)
{
    const pd_piece *piece = &pieces[at->piece];
    at->byte += bytes;
    at->block += (uint32_t)(at->byte / piece->bytes);
    at->byte %= piece->bytes;
    if (at->block == piece->blocks)
        *at = (cursor){at->piece + 1, 0, 0};
}
