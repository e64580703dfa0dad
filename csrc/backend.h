/* What a transport's backend does; core.c does the rest: tags, peers, queues, slices, threads, endings. */
#ifndef PD_BACKEND_H
#define PD_BACKEND_H

#include "pd.h"

#include <stdbool.h>

enum { PD_SLICE_BYTES = 1 << 20, PD_SLICE_PIECES = 1024 };

/* Registered memory, immutable once made. */
typedef struct {
    int refs; /* under the transport's lock */
    size_t num_regions, num_grids;
    pd_region *regions;
    pd_grid *grids;
} pd_memory;

/* `bytes` at `offset` of each of `blocks` source blocks from `block` on, one behind the other from `dst` on. */
typedef struct {
    uint64_t grid, offset, bytes;
    uint32_t block, blocks;
    unsigned char *dst;
} pd_piece;

typedef struct {
    const pd_lease *lease;
    const pd_piece *pieces;
    size_t count;
} pd_slice;

typedef struct pd_backend {
    const char *name;
    /* A backend's own state of a transport; NULL after an error. */
    void *(*open)(void);
    void (*close)(void *own);
    int (*describe)(void *own, unsigned char *out, size_t room);
    /* Owner's side, one call at a time. */
    int (*publish)(void *own, const pd_memory *memory);
    int (*grant)(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups);
    void (*revoke)(void *own, uint64_t number, uint64_t epoch);
    /* Reader's side. `connect` makes the backend's state of a peer and may take a while; NULL after an error. */
    int (*can_reach)(const unsigned char *remote, size_t bytes);
    void *(*connect)(const unsigned char *remote, size_t bytes);
    void (*disconnect)(void *peer);
    /* Copy a slice. Only PD_DONE says that it is whole; on return nothing of it writes any more. Any thread, several at
     * once. Words about what went wrong by pd_fail. */
    pd_status (*read)(void *peer, const pd_slice *slice);
} pd_backend;

extern const pd_backend pd_shm;

/* Set what pd_last_error says; returns -error. */
int pd_fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
