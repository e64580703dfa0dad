/* Reads over InfiniBand or RoCE by one-sided operations: the reader's device fetches from the owner's registered memory.
 *
 * Every agent opens some ports of RDMA devices, its *rails*, registers its memory with each, and runs a thread with a
 * loop over everything that tells of news: connections, completions, events of the devices. To every owner a reader has
 * *lanes*: one reliable queue pair over one pair of rails, and a TCP connection that goes with it. The connection introduces
 * the queue pairs to each other, brings the owner's addresses and keys, asks what a lease covers, and its end tells each
 * side at once that the other is gone. Bytes never go over it.
 *
 *     reader -> owner   JOIN                        who I am, which of your rails, my queue pair
 *     owner -> reader   JOINED or REFUSED, MEMORY   your queue pair; the grids, addresses and keys
 *     reader -> owner   ASK                         may I read this lease?
 *     owner -> reader   ANSWER                      the blocks that it covers, or why not
 *     reader -> owner   WRITE                       write these pieces of a lease to me (instead of reading, if configured)
 *     owner -> reader   ANSWER                      only why not: else the last write brings the serial
 *
 * A reader asks before the first slice of a read and again every VERBS_ALLOWANCE bytes, so that the owner's processor has
 * nothing to do with the bytes and a lease that ended is not read for long; what it covers is checked here, by the reader,
 * as in shm: COMMIT decides about correctness. All numbers are little-endian. */
#ifndef PD_VERBS_H
#define PD_VERBS_H

#include "cuda_mover.h"
#include "grants.h"
#include "ibverbs.h"
#include "net.h"
#include "pieces.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire's numbers are little-endian");

enum {
    VERBS_INSTANCE = 16,
    VERBS_RAILS = 8,
    VERBS_LANES = 16,     /* to one owner */
    VERBS_REQUESTS = 256, /* work requests that a queue pair holds */
    VERBS_BATCH = 64,     /* of them are handed over at once, with one completion */
    VERBS_DEPTH = 4,      /* slices in flight per lane */
    VERBS_ALLOWANCE = 64 << 20,
    VERBS_CONNECTIONS = 1024, /* that an owner serves at once */
    VERBS_SCRATCH = 255,      /* places of VERBS_INSTANCE bytes in a rail's scratch memory */
    VERBS_MESSAGE = 16 << 20, /* bytes of the largest message */
    VERBS_BLOCKS = 4 << 20,   /* that a lease may have, all groups together */
    VERBS_STRANGERS = 128,    /* of an owner's connections that have not joined; then the oldest goes */
    VERBS_PERMITS = 16,       /* kept per lane for reads that may go on */
    VERBS_PIECES = 2 * PD_SLICE_PIECES, /* that one WRITE may ask for */
    VERBS_GREETING_MS = 10000,
    VERBS_SETTLE_MS = 1000, /* that a read which nobody wants may still take before its queue pair is broken */
    VERBS_PAUSE_MS = 30000, /* before a lane that broke is tried again */
};

typedef struct { /* pd_options.settings */
    uint32_t num_rails, queues; /* queue pairs per rail and owner */
    uint32_t timeout, retries;  /* as verbs have them: 4.096 us * 2**timeout for an answer; 7 retries may be for ever */
    uint32_t max_reads;         /* that a queue pair has under way at once, at most; the devices may have less */
    uint32_t poll_us;           /* look for completions so long before waiting for them */
    uint32_t write, relaxed, on_demand;
    uint32_t traffic_class;
    uint64_t max_mr_bytes; /* per registration; 0: what the device can */
    struct {
        char device[64];
        uint32_t port, gid_index;
    } rails[VERBS_RAILS];
} verbs_settings;

typedef struct { /* of a port, in a description */
    unsigned char gid[16];
    uint16_t lid;
    uint8_t link_layer, reserved;
} verbs_port;

typedef struct { /* what pd_describe writes */
    char magic[8];
    unsigned char instance[VERBS_INSTANCE]; /* tells an owner from whoever binds its port next; only peers are told it */
    net_address at;
    uint32_t num_rails;
    verbs_port rails[VERBS_RAILS];
} verbs_where;

typedef enum { JOIN = 1, JOINED, REFUSED, MEMORY, ASK, ANSWER, WRITE } verbs_kind;

typedef struct {
    uint32_t kind, bytes;
} verbs_head;

typedef struct { /* one end of a pair of queues */
    uint32_t number, sequence;
    uint16_t lid;
    uint8_t mtu, reads;
    unsigned char gid[16];
} verbs_end;

typedef struct {
    char magic[8];
    unsigned char instance[VERBS_INSTANCE]; /* whom the reader means */
    uint32_t rail, reserved;
    verbs_end end;
} verbs_join;

typedef struct {
    verbs_end end;
    uint64_t token; /* where the owner's instance can be read, to try the way */
    uint32_t token_key, reserved;
} verbs_joined;

typedef struct {
    uint64_t chunk; /* bytes of a region per key */
    uint32_t num_regions, num_grids, num_keys, reserved;
} verbs_memory; /* then the regions, grids, keys */

typedef struct {
    uint64_t address, length;
} verbs_region;

typedef struct {
    uint64_t serial, number, epoch;
    uint32_t pieces, capability_bytes; /* pieces: of a WRITE */
    unsigned char capability[PD_MAX_CAPABILITY];
} verbs_ask;

typedef struct {
    uint64_t serial;
    uint32_t status, groups;
} verbs_answer; /* then words, or for every group its id, how many runs it has, and these: first, count */

typedef struct {
    uint64_t grid, offset, bytes, dst;
    uint32_t block, blocks, key, reserved;
} verbs_piece;

typedef struct verbs verbs;
typedef struct queue queue;

/* A connection that carries messages. Both kinds of its users start with one. */
typedef struct {
    source source;
    int epoll;
    bool writing, deaf; /* deaf: what comes is left where it is for now */
    verbs_head head;
    size_t got; /* of the head, then of the body */
    bool in_body;
    unsigned char *in, *out;
    size_t in_room, out_room, out_bytes, out_at;
} wire;

/* A port of a device. */
typedef struct rail rail;
struct rail {
    source completions, events;
    struct verbs *verbs;
    int index;
    char name[80];
    ib_context *context;
    ib_pd *pd;
    ib_channel *channel;
    ib_mr *scratch_mr, *token_mr;
    unsigned char *scratch, *token; /* where instances of others are read to; our own, which all may read */
    uint8_t port, gid_index, link_layer;
    uint64_t max_mr;
    int max_requests, max_completions, reads_out, reads_in;
    _Atomic bool down;
    queue *queues;
};

/* Memory that slices of short runs are read into. */
typedef struct buffer {
    struct buffer *next;
    unsigned char *bytes;
    bool pinned, reachable; /* for a GPU; also for its kernels */
    ib_mr *mrs[VERBS_RAILS];
} buffer;

/* What memory of a GPU needs beside its registration, once there is some: the GPU itself, which puts short runs in their
 * places, and on some machines a flush before it sees what RDMA devices wrote. */
typedef struct {
    cuda_mover mover;
    atomic_bool ready;
    bool flushes;
} verbs_gpu;

/* Registered memory: one key per rail and chunk of a region. */
typedef struct keys keys;
struct keys {
    _Atomic int refs;
    pd_memory *memory;
    uint64_t chunk;
    size_t num_rails, num_chunks;
    size_t *first;  /* chunk of each region */
    size_t *sorted; /* regions by address */
    ib_mr **mrs;    /* [rail * num_chunks + chunk] */
};

/* What is read from: the memory of an owner. */
typedef struct {
    int refs;
    pd_memory *memory;
    uint64_t chunk;
    size_t *first;
    uint32_t *keys;
} table;

typedef enum { NOT_JOINED, TO_JOIN, JOINED_WELL, JOINED_ILL } queue_joining;

/* A reliable queue pair with its completions. */
struct queue {
    queue *next, **at; /* among those of the rail */
    struct rail *rail;
    ib_cq *cq;
    ib_qp *qp;
    verbs_end end;
    unsigned room; /* for further work requests */
    unsigned first, count;
    struct {
        void *what;
        unsigned requests;
    } batches[VERBS_REQUESTS]; /* under way, in order */
    _Atomic int joining; /* a queue_joining */
    verbs_end other;
    queue *next_to_join;
    bool broken;
    int error; /* the first completion's that was none */
    char words[PD_MAX_WORDS];
    void (*landed)(queue *self, void *what, bool whole);
    void (*arrived)(queue *self, uint32_t serial); /* a write of the other side with a number */
};

typedef struct {
    _Atomic uint64_t requests, batches, bytes, asks, writes, lanes, broken, on_demand, dma_bufs;
} verbs_counts;

typedef struct peer peer;
typedef struct served served;

typedef struct flight flight;

struct verbs {
    pd_transport *core;
    const pd_options *options;
    verbs_settings settings;
    verbs_where where;
    struct rail *rails;
    int num_rails;
    source listener, bell;
    int epoll, spare;
    pthread_t thread;
    bool running;
    atomic_bool stop;
    verbs_counts counts;
    grants leases;
    pthread_t joiner;
    bool joining;
    pthread_cond_t to_join;
    queue *joins; /* under the lock */
    pthread_mutex_t lock; /* guards the three below, too */
    struct keys *keys;
    uint64_t generation; /* of the keys */
    struct peer *new_peers;
    struct peer *peers; /* the rest is the thread's own */
    struct served *served;
    unsigned num_served;
    uint32_t next_sequence;
    uint64_t next_serial;
    flight *spare_flights;
    buffer *buffers;
    verbs_gpu gpu;
    verbs_piece list[VERBS_PIECES]; /* of a WRITE that is being made */
    pd_piece pieces[PD_SLICE_PIECES];
};

extern const char verbs_magic[8];

/* verbs_device.c */
int verbs_probe(void);
int rails_open(verbs *all);
void rails_close(verbs *all);
keys *keys_make(verbs *all, pd_memory *memory); /* NULL after pd_fail */
keys *keys_hold(verbs *all);                    /* the ones in force */
void keys_release(keys *each);
/* The registration that `at` lies in, and `bytes` cut to where it ends; NULL: none. */
const ib_mr *keys_find(const keys *each, int index, uint64_t at, uint64_t *bytes);

/* The same for a destination of a read, which may be a buffer. */
const ib_mr *destination_find(const verbs *all, const keys *each, int index, uint64_t at, uint64_t *bytes);
unsigned char *buffer_make(void *own);
void buffers_free(verbs *all);

/* verbs_gpu.c */
int gpu_publish(verbs *all, const pd_memory *memory); /* before it is registered; negative after pd_fail */
/* A descriptor for a region, to be closed, and where in its dma-buf the region starts; negative after pd_fail. */
int gpu_dma_buf(const verbs *all, const pd_region *region, uint64_t *offset);
bool gpu_flush(verbs *all); /* what RDMA devices wrote is visible to what the GPU does from now on; false after pd_fail */
bool gpu_unpin(verbs *all, const buffer *each); /* false: a GPU that is stuck may still read it */
pd_status verbs_place(void *own, const pd_rows *rows, size_t count);
void gpu_close(verbs *all);

/* verbs_queue.c. Joining may take a second, for the kernel looks for the way to the other port: a thread does it. */
int queue_make(queue *made, rail *on);
void queue_join(queue *each, const verbs_end *other); /* ends with a wake-up and `joining` JOINED_WELL or JOINED_ILL */
int joiner_start(verbs *all);
void joiner_stop(verbs *all);
int queue_post(queue *each, ib_send_wr *requests, unsigned count, void *what);
void queue_receive(queue *each, unsigned count);
void queue_break(queue *each);
bool queue_quiet(const queue *each); /* nothing of it moves any more */
bool queue_free(queue *each); /* false: the device keeps it, and may still write */
bool rails_look(verbs *all); /* take completions; false: there were none */
void rail_completions(source *self, uint32_t events);

/* verbs_wire.c */
void wire_open(wire *each, int epoll, int fd, void (*ready)(source *, uint32_t), bool connecting);
void wire_close(wire *each);
bool wire_send(wire *each, verbs_kind kind, const void *head, size_t head_bytes, const void *body, size_t body_bytes);
bool wire_flush(wire *each);
void wire_listen(wire *each, bool listens);
/* A whole message: 1. Not yet: 0. -1: closed, or it broke the protocol; `most` bytes are borne. */
int wire_receive(wire *each, size_t most);

/* verbs_table.c */
bool memory_encode(const keys *of, int index, unsigned char **out, size_t *bytes);
table *table_parse(const unsigned char *body, size_t bytes);
void table_release(table *each);
uint32_t table_key(const table *each, const pd_piece *piece, uint64_t at, uint64_t *bytes);
bool grant_encode(const grant *leased, unsigned char **out, size_t *bytes);
grant *grant_parse(const unsigned char *body, size_t bytes, uint32_t groups);

/* verbs_peer.c */
int verbs_can_reach(void *own, const unsigned char *remote, size_t bytes);
void *verbs_dial(void *own, uint64_t peer, const unsigned char *remote, size_t bytes);
void verbs_disconnect(void *peer);
void peers_turn(verbs *all, bool woken);
void peers_close(verbs *all);
int64_t peers_deadline(const verbs *all);

/* verbs_flight.c */
void flights_free(verbs *all);

/* verbs_owner.c */
int verbs_listen(verbs *all);
void served_turn(verbs *all);
void served_close(verbs *all);
int64_t served_deadline(const verbs *all);

#endif
