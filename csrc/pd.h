/* The native data plane of pd_connector; usable without Python. */
#ifndef PD_H
#define PD_H

#include <stddef.h>
#include <stdint.h>

/* --- copying ------------------------------------------------------------------------------------------------------ */

/* Copy `bytes` that do not overlap, with streaming stores where the processor has them. On return the bytes are visible
 * to every thread that synchronises with this one. */
void pd_copy(void *dst, const void *src, size_t bytes);

/* The copiers compiled in, best first: NULL for one that does not run on this processor. For tests and benchmarks. */
int pd_copier_count(void);
const char *pd_copier_name(int index);
void pd_copy_with(int index, void *dst, const void *src, size_t bytes);

/* GB/s of `chunks` copies from random places to random places, `chunk` bytes each: by one and by two threads with
 * memcpy, then the same with pd_copy. Takes 4 * chunk * chunks bytes of fresh memory. For benchmarks. */
int pd_limits(size_t chunk, size_t chunks, int huge, double out[4]);

/* --- transports ---------------------------------------------------------------------------------------------------

 * One function per method of the Python interface pd_connector.transport.base.Transport, which says what each must do.
 * Every function returns 0 (or a count), or a negative errno after which pd_last_error has the words. All of them may be
 * called from any thread at any time, except pd_close, which must be the last call. None waits for a peer. */

typedef struct pd_transport pd_transport;

enum { PD_MAX_OPEN_TAGS = 65536, PD_MAX_CAPABILITY = 64, PD_MAX_DESCRIPTION = 1024, PD_MAX_WORDS = 256 };

typedef enum { PD_DONE, PD_CANCELLED, PD_NOT_GRANTED, PD_PEER_LOST, PD_ERROR } pd_status;

typedef struct {
    uint64_t address, length;
    int32_t fd; /* of the memfd or the dma-buf that the region lies in, or -1 */
    uint32_t flags;
    uint64_t fd_offset, fd_length; /* where in it the region starts; bytes of the whole of it */
    int32_t device;                /* of PD_OF_DEVICE memory: its number, -1: whichever it lies on */
    uint32_t reserved;
} pd_region;

/* Flags of a region: its pages may not be written; `fd` is a dma-buf's; it is the memory of a device. */
enum { PD_READ_ONLY = 1, PD_DMA_BUF = 2, PD_OF_DEVICE = 4 };

typedef struct { /* in canonical order */
    uint32_t region, group;
    uint64_t offset, block_stride, block_bytes;
    uint64_t num_blocks;
} pd_grid;

typedef struct {
    uint32_t src_block, dst_block, count;
} pd_run;

enum { PD_DIMS = 3 };

typedef struct { /* `bytes` of every block, and again for each place of the dimensions, outermost first; unused: count 1 */
    uint64_t src_grid, dst_grid, src_offset, dst_offset, bytes;
    struct {
        uint64_t count, src_stride, dst_stride;
    } dims[PD_DIMS];
} pd_pattern;

typedef struct { /* every pattern of every run; a side advances by its step from block to block of a run */
    const pd_run *runs;
    const pd_pattern *patterns;
    size_t num_runs, num_patterns;
    uint32_t src_step, dst_step;
} pd_plan;

typedef struct {
    const uint32_t *ids;
    size_t count;
    uint32_t group;
} pd_blocks;

typedef struct {
    uint64_t number, epoch;
    const unsigned char *capability;
    size_t capability_bytes;
} pd_lease;

typedef struct {
    uint64_t tag;
    pd_status status;
    char words[PD_MAX_WORDS];
} pd_completion;

typedef struct {
    int threads;
    const int *cpus; /* none: every processor this process may use */
    size_t num_cpus;
    int pin; /* a thread is given one of them, in turn, instead of all */
    const char *host, *advertise; /* numeric addresses to listen at and to tell peers; of backends on the network */
    int port;                     /* 0: any free one */
    const void *settings;         /* of one backend alone, as its header says */
    size_t settings_bytes;
} pd_options;

typedef struct {
    char name[32];
    uint64_t value;
} pd_counter;

const char *pd_last_error(void); /* of this thread's last call that failed */

int pd_probe(const char *backend); /* can it be opened here at all? */
int pd_open(const char *backend, const pd_options *options, pd_transport **out);
/* 0; 1: a device may still write into memory that was registered, or read it, for as long as this process lives. */
int pd_close(pd_transport *transport);
int pd_describe(pd_transport *transport, unsigned char *out, size_t room); /* bytes written */
/* GB/s of bare TCP over the loopback by 1, 2, 4 and 8 lanes, as far as there are `most`; how many figures. Takes some ten
 * milliseconds. */
int pd_tcp_lanes(const pd_options *options, int most, double out[4]);
int pd_dma_buf(const char *rdma_device); /* whether it takes memory of other devices as dma-bufs */
int pd_can_reach(pd_transport *transport, const unsigned char *remote, size_t bytes);
int pd_register(pd_transport *transport, const pd_region *regions, size_t num_regions, const pd_grid *grids,
                size_t num_grids);
int pd_grant(pd_transport *transport, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups);
int pd_revoke(pd_transport *transport, uint64_t number, uint64_t epoch);
/* `peer` is the caller's number for one connection attempt and is never used again; `name` is for messages. */
int pd_connect(pd_transport *transport, uint64_t peer, const char *name, const unsigned char *remote, size_t bytes,
               uint64_t tag);
int pd_disconnect(pd_transport *transport, uint64_t peer);
int pd_post_read(pd_transport *transport, uint64_t peer, const pd_lease *lease, const pd_plan *plan, uint64_t tag,
                 int priority);
int pd_cancel(pd_transport *transport, uint64_t tag);
int pd_fence(pd_transport *transport, uint64_t peer, uint64_t tag);
int pd_poll(pd_transport *transport, pd_completion *out, int limit); /* completions written */
int pd_fileno(const pd_transport *transport); /* readable while pd_poll has something */
int pd_counters(pd_transport *transport, pd_counter *out, int room); /* how many there are; most backends have none */

#endif
