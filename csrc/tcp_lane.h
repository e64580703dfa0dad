/* The reader's side of the tcp backend: lanes to owners. A lane is one connection, of one loop; a peer has one in each. */
#ifndef PD_TCP_LANE_H
#define PD_TCP_LANE_H

#include "tcp.h"

typedef struct {
    unsigned char *at;
    size_t bytes;
} span;

/* A slice in flight. */
typedef struct {
    pd_taken *taken; /* NULL: its read ended, the bytes go to waste */
    uint64_t serial;
    uint32_t bytes;
    size_t count, room;
    span *spans;
} flight;

typedef struct {
    tcp *tcp;
    uint64_t number;
    atomic_int refs;    /* its lanes, and the core's */
    atomic_int pending; /* lanes that have not been greeted yet */
    atomic_bool lost, gone; /* given up by a lane; the core wants it no more */
    tcp_where where;
} peer;

typedef enum { CONNECTING, GREETING, OPEN, CLOSED } lane_state;

struct lane {
    source source;
    lane *next;
    loop *loop;
    peer *peer;
    lane_state state;
    bool writing; /* epoll tells when it can be written to */
    int64_t deadline;
    uint64_t serial;
    unsigned first, count; /* in flights */
    flight flights[TCP_DEPTH];
    unsigned char out[sizeof(request) + PD_SLICE_PIECES * sizeof(wire_piece)];
    size_t out_bytes, out_at;
    union {
        unsigned char bytes[sizeof(greeting)];
        greeting greeting;
        answer answer;
    } in;
    size_t in_at;
    int least; /* bytes that epoll tells of */
    bool in_body;
    uint32_t left; /* of the body */
    size_t span, span_at;
    char words[PD_MAX_WORDS];
};

void peer_unref(peer *each);
void lane_free(lane *each);

#endif
