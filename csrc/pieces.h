/* The way through a list of pieces, one stretch after the other. */
#ifndef PD_PIECES_H
#define PD_PIECES_H

#include "backend.h"

typedef struct { /* what comes next */
    size_t piece;
    uint32_t block;
    uint64_t byte;
} cursor;

/* The next stretch that is in one piece on both sides; `memory` has the blocks of the pieces. False: there is none. */
bool cursor_at(const cursor *at, const pd_memory *memory, const pd_piece *pieces, size_t count, uint64_t *src,
               uint64_t *dst, uint64_t *bytes);
void cursor_move(cursor *at, const pd_piece *pieces, uint64_t bytes);

#endif
