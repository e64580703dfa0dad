/* Reads over plain TCP. Every agent runs a few threads, each with a loop over the connections that are its own: those on
 * which it serves readers (tcp_owner.c), and its lane to every owner that it reads from (tcp_lane.c). Nothing blocks but
 * the wait for events, so a read that ended is quiet at once, whatever its owner does.
 *
 *     reader -> owner   greeting
 *     owner -> reader   greeting
 *     reader -> owner   request, wire_piece * pieces      as many as the reader likes, answered in this order
 *     owner -> reader   answer, then the bytes, or words when its status is not PD_DONE
 *
 * All numbers are little-endian. A request names blocks; each end expands them from its own grids. */
#ifndef PD_TCP_H
#define PD_TCP_H

#include "backend.h"
#include "table.h"

#include <pthread.h>
#include <sys/socket.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire's numbers are little-endian");

enum {
    TCP_INSTANCE = 16,
    TCP_DEPTH = 4,          /* slices in flight per lane */
    TCP_CONNECTIONS = 1024, /* that an owner serves at once */
    TCP_IOVECS = 128,
    TCP_BATCH = 128 << 10, /* bytes of a body that a reader wakes up for */
    TCP_PATIENCE_MS = 15000, /* without a byte where one is due */
    TCP_GREETING_MS = 10000,
    TCP_LOOPS = 16,
};

typedef struct { /* what pd_describe writes */
    char magic[8];
    unsigned char instance[TCP_INSTANCE]; /* tells an owner from whoever binds its port next */
    uint16_t family, port;                /* 4 or 6 */
    unsigned char address[16];
} tcp_where;

typedef struct {
    char magic[8];
    unsigned char instance[TCP_INSTANCE]; /* the owner's: whom the reader means, who answers */
} greeting;

typedef struct {
    uint64_t serial, number, epoch;
    uint32_t bytes, pieces, capability_bytes, reserved;
    unsigned char capability[PD_MAX_CAPABILITY];
} request;

typedef struct {
    uint64_t grid, offset, bytes;
    uint32_t block, blocks;
} wire_piece;

typedef struct {
    uint64_t serial;
    uint32_t status, bytes;
} answer;

/* Something that epoll tells of. */
typedef struct source {
    void (*ready)(struct source *self, uint32_t events);
    int fd;
} source;

typedef struct tcp tcp;
typedef struct lane lane;
typedef struct connection connection;

typedef struct loop {
    source bell;
    tcp *tcp;
    int epoll;
    pthread_t thread;
    bool running;
    pthread_mutex_t lock; /* guards the two below */
    lane *new_lanes;
    connection *new_connections;
    lane *lanes;             /* the rest is the thread's own */
    connection *connections; /* what is closed goes only between two rounds of events */
    pd_piece pieces[PD_SLICE_PIECES];
    unsigned char waste[65536];
} loop;

struct tcp {
    pd_transport *core;
    unsigned char instance[TCP_INSTANCE];
    tcp_where where;
    source listener;
    int spare; /* a descriptor to refuse a connection with when there are no more */
    loop *loops;
    int num_loops;
    const pd_options *options;
    atomic_bool stop;
    unsigned next_loop;
    atomic_int served;
    pthread_mutex_t lock; /* guards the two below */
    pd_memory *memory;
    pd_table grants; /* by lease number, see tcp_grants.c */
};

typedef struct {
    uint32_t id;
    size_t count;
    uint32_t *ids; /* ascending, each once */
} group;

typedef struct grant {
    struct grant *next; /* of the same number */
    uint64_t epoch;
    size_t capability_bytes, num_groups;
    unsigned char capability[PD_MAX_CAPABILITY];
    group groups[];
} grant;

extern const char tcp_magic[8];

int64_t tcp_now_ms(void);
void tcp_watch(loop *each, source *what, bool writing, bool added);
void tcp_drop(loop *each, source *what);
void tcp_tune(int fd);
void tcp_wake(void *own);

/* tcp_peer.c, tcp_lane.c */
int tcp_can_reach(const unsigned char *remote, size_t bytes);
void *tcp_dial(void *own, uint64_t peer, const unsigned char *remote, size_t bytes);
void tcp_disconnect(void *peer);
void lanes_turn(loop *each, bool woken);
void lanes_close(loop *each);
int64_t lanes_deadline(const loop *each);

/* tcp_grants.c */
int tcp_publish(void *own, pd_memory *memory);
int tcp_grant(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups);
void tcp_revoke(void *own, uint64_t number, uint64_t epoch);
void grants_free(tcp *own);
grant *grant_find(tcp *own, uint64_t number, uint64_t epoch);                        /* under the lock */
bool grant_covers(const grant *leased, uint32_t group, uint64_t first, uint64_t count);

/* tcp_owner.c */
int tcp_listen(tcp *own, const pd_options *options);
void connections_turn(loop *each);
void connections_close(loop *each);
int64_t connections_deadline(const loop *each);

#endif
