/* What a transport's backend does; core.c does the rest: tags, peers, queues, slices, threads, endings. */
#ifndef PD_BACKEND_H
#define PD_BACKEND_H

#include "pd.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { PD_SLICE_BYTES = 1 << 20, PD_MAX_SLICE_BYTES = 4 << 20, PD_SLICE_PIECES = 1024 };

/* Registered memory, immutable once made. */
typedef struct {
    _Atomic int refs;
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

/* A slice that was taken, as its taker names it to the core. */
typedef struct pd_taken pd_taken;

typedef struct {
    uint64_t tag; /* of its read */
    const pd_taken *taken;
    const pd_lease *lease;
    const pd_piece *pieces;
    size_t count;
    uint64_t bytes;
} pd_slice;

/* `count` times `bytes`, a stride apart on each side. */
typedef struct {
    unsigned char *dst;
    const unsigned char *src;
    uint64_t dst_stride, src_stride, bytes, count;
    uint32_t flags; /* of the region that they go to */
} pd_rows;

enum { PD_MAX_ROWS = 256 };

typedef struct pd_backend {
    const char *name;
    int (*probe)(void); /* 0, or why it cannot work here; NULL: it works everywhere */
    /* A backend's own state of a transport; NULL after an error. `core` is for the calls below. */
    void *(*open)(pd_transport *core, const pd_options *options);
    void (*close)(void *own);
    int (*describe)(void *own, unsigned char *out, size_t room);
    int (*counters)(void *own, pd_counter *out, int room); /* NULL: none */
    int per_peer; /* of the core's threads that may be inside of one peer's slices, for what a peer can hold up; 0: all */
    uint64_t slice_bytes; /* that a slice has at most, up to PD_MAX_SLICE_BYTES; 0: PD_SLICE_BYTES */
    /* Owner's side, one call at a time. A backend keeps the memory with pd_retain, if it needs it. */
    int (*publish)(void *own, pd_memory *memory);
    int (*grant)(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups);
    void (*revoke)(void *own, uint64_t number, uint64_t epoch);
    int (*can_reach)(void *own, const unsigned char *remote, size_t bytes);
    /* Reader's side, of a backend whose slices are copied by threads of the core. `connect` makes the backend's state of
     * a peer and may take a while; NULL after an error. */
    void *(*connect)(void *own, const unsigned char *remote, size_t bytes);
    void (*disconnect)(void *peer);
    /* Copy a slice. Only PD_DONE says that it is whole; on return nothing of it writes any more. Any thread, several at
     * once. Words about what went wrong by pd_fail. */
    pd_status (*read)(void *peer, const pd_slice *slice);
    /* As many bytes as a slice has that its reads can write to, for slices of short runs; the backend's for as long as it
     * lives. Called under the core's lock. NULL after an error; no such function: any memory will do. */
    unsigned char *(*buffer)(void *own);
    /* Copy at most PD_MAX_ROWS rows of such a buffer to where they belong, where some of that is memory that the processor
     * cannot reach; on return they are there. */
    pd_status (*place)(void *own, const pd_rows *rows, size_t count);
    /* Reader's side, of a backend with threads of its own, instead of `read`. `dial` starts to connect and ends with
     * pd_dialled; NULL after an error. `wake`: there is a slice to take, or one to give back because its read ended.
     * `stop` ends the threads, and every slice is given back before it returns. */
    void *(*dial)(void *own, uint64_t peer, const unsigned char *remote, size_t bytes);
    void (*wake)(void *own);
    void (*stop)(void *own);
} pd_backend;

/* For a backend with threads of its own; none of them under a lock that `wake` takes.
 *
 * The next slice of that peer's reads, its pieces in `pieces` (room for PD_SLICE_PIECES); NULL: there is none. Each one
 * taken must be given back, once nothing of it writes any more. */
pd_taken *pd_take(pd_transport *core, uint64_t peer, pd_piece *pieces, pd_slice *slice);
bool pd_wanted(pd_transport *core, const pd_taken *taken); /* its read has not ended */
bool pd_closing(pd_transport *core);
bool pd_closing_for(pd_transport *core, int milliseconds); /* and since so long */
void pd_abandon(pd_transport *core); /* a device that was given up may still write: pd_close is to say so */
void pd_give(pd_transport *core, pd_taken *taken, pd_status status, const char *words);
void pd_dialled(pd_transport *core, uint64_t peer, pd_status status, const char *words);
void pd_lost(pd_transport *core, uint64_t peer, const char *words);
void pd_retain(pd_memory *memory);
void pd_release(pd_memory *memory);
/* A thread that leaves signals to the host's own, but for those that tell of its own crash. 0, or an errno. */
int pd_start(pthread_t *out, void *(*run)(void *), void *argument);
void pd_pin(const pd_options *options, int index); /* the calling thread, which is the index-th, to its processors */

extern const pd_backend pd_shm, pd_tcp, pd_verbs, pd_hixl, pd_hccl, pd_cuda_ipc;

/* Set what pd_last_error says; returns -error. */
int pd_fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
