/* What core.c (the interface), plan.c (memory and plans) and reads.c (queues, endings, threads) share.
 *
 * A read is a plan with a cursor. Threads take the next slice of the read whose turn it is: lower priority numbers
 * first, reads of one priority in turn, so a small read is never behind a big one. A read that ended (all copied, failed,
 * cancelled, its peer gone) hands out no further slice, and its completion is given when no thread is inside one of its
 * slices any more: then nothing can write to its destination.
 *
 * One lock guards all of it; it is never held while bytes move. */
#ifndef PD_CORE_H
#define PD_CORE_H

#include "backend.h"
#include "table.h"

#include <pthread.h>

enum { PRIORITIES = 2, MAX_THREADS = 64 };

typedef enum { READ, CONNECT, FENCE } op_kind;

typedef struct peer {
    uint64_t number;
    int refs, busy; /* threads of the core inside of its slices */
    bool ready, lost;
    void *own;               /* the backend's */
    struct op *dialling;     /* the CONNECT that a backend with threads of its own has not finished */
    struct op *reads;        /* that are not complete */
    char name[128];
} peer;

/* What one tag stands for. */
typedef struct op {
    op_kind kind;
    pd_completion end;
    bool ended; /* hands out nothing more; `end` says why */
    bool over;  /* handed out as a completion */
    bool settling; /* ended while a thread was inside */
    int busy;   /* threads inside */
    int priority;
    uint64_t when; /* a READ: it ended; a FENCE: it was asked for. By the transport's own count */
    struct op *next, *previous; /* in a queue; then `next` among the completed */
    struct op *next_of_peer;
    peer *peer;
    /* READ */
    pd_lease lease;
    unsigned char capability[PD_MAX_CAPABILITY];
    pd_memory *memory;
    pd_run *runs;
    pd_pattern *patterns;
    size_t num_runs, num_patterns;
    uint32_t src_step, dst_step;
    size_t pattern, run; /* with block, place and byte the cursor: what comes next */
    uint64_t block, place, byte;
    uint64_t left; /* bytes that no finished slice has copied */
    uint64_t slice_bytes;
    /* CONNECT */
    unsigned char *remote;
    size_t remote_bytes;
    /* FENCE */
    size_t waiting; /* reads that were settling then and still are */
} op;

/* A slice that somebody is inside of. Runs too short to be read one by one come as whole spans of source blocks into a
 * buffer, and are put in their places when all of it is there. */
struct pd_taken {
    struct pd_taken *next; /* among the unused */
    op *read;
    uint64_t bytes; /* of the destination */
    size_t spans;
    struct {
        const pd_pattern *pattern;
        unsigned char *dst; /* where the pattern's first run goes */
    } span[PD_SLICE_PIECES];
    unsigned char *buffer; /* a whole slice; made when first needed, by the backend if it must be special */
};

struct pd_transport {
    const pd_backend *backend;
    void *own;
    pthread_mutex_t lock, owner_lock; /* owner_lock: the backend's publish, grant and revoke */
    pthread_cond_t work;
    bool stop;
    int64_t stopped; /* when, by net_now_ms */
    atomic_bool abandoned;
    int bell;
    uint64_t events; /* ends and fences so far */
    size_t settling;
    op *fences; /* that wait, by next_of_peer */
    pd_memory *memory;
    pd_table peers, tags;
    op *queues[PRIORITIES]; /* rings: the head's previous is the tail */
    op *done, **done_tail;
    pd_taken *unused;
    pd_options options;
    int *cpus;
    pthread_t threads[MAX_THREADS];
    int running, connecting;
    atomic_int started;
};

/* plan.c */
void *duplicate(const void *data, size_t count, size_t size);
pd_memory *memory_make(const pd_region *regions, size_t num_regions, const pd_grid *grids, size_t num_grids);
int check_grids(const pd_region *regions, size_t num_regions, const pd_grid *grids, size_t num_grids);
int check_plan(const pd_memory *memory, const op *read, uint64_t *total);
uint64_t cut(pd_transport *transport, op *read, pd_taken *taken, pd_piece *pieces, size_t *count);
pd_status scatter(pd_transport *transport, const pd_taken *taken);

/* reads.c, all under the lock */
op *op_open(pd_transport *transport, op_kind kind, uint64_t tag);
void op_free(op *each);
void enqueue(pd_transport *transport, op *each);
void complete(pd_transport *transport, op *each);
void dialled(pd_transport *transport, peer *each, pd_status status, const char *words);
void end(pd_transport *transport, op *read, pd_status status, const char *words);
void end_all(pd_transport *transport, peer *owner, pd_status status, const char *words);
void peer_release(pd_transport *transport, peer *each);
int start_threads(pd_transport *transport);

#endif
