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

#include "grants.h"
#include "net.h"

#include <pthread.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire's numbers are little-endian");

enum {
    TCP_INSTANCE = 16,
    TCP_DEPTH = 4,          /* slices in flight per lane */
    TCP_CONNECTIONS = 1024, /* that an owner serves at once */
    TCP_IOVECS = 128,
    TCP_BATCH = 128 << 10, /* bytes of a body that a reader wakes up for */
    TCP_GREETING_MS = 10000,
    TCP_LOOPS = 16,
};

typedef struct { /* what pd_describe writes */
    char magic[8];
    unsigned char instance[TCP_INSTANCE]; /* tells an owner from whoever binds its port next */
    net_address at;
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
    grants grants;
};

extern const char tcp_magic[8];

void tcp_wake(void *own);

/* tcp_peer.c, tcp_lane.c */
int tcp_can_reach(void *own, const unsigned char *remote, size_t bytes);
void *tcp_dial(void *own, uint64_t peer, const unsigned char *remote, size_t bytes);
void tcp_disconnect(void *peer);
void lanes_turn(loop *each, bool woken);
void lanes_close(loop *each);
int64_t lanes_deadline(const loop *each);

/* tcp_owner.c */
int tcp_listen(tcp *own, const pd_options *options);
void connections_turn(loop *each);
void connections_close(loop *each);
int64_t connections_deadline(const loop *each);

#endif
