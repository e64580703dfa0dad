/* The reader's side of the verbs backend: owners, lanes to them, slices in flight; see verbs.h. */
#ifndef PD_VERBS_LANE_H
#define PD_VERBS_LANE_H

#include "verbs.h"

typedef struct lane lane;

/* What an owner said about a lease, for one read and so many bytes. */
typedef struct permit {
    struct permit *next;
    uint64_t tag, serial;
    uint64_t left; /* bytes that may still be asked for under it */
    int64_t asked; /* when */
    int refs;      /* flights; without any it is kept for the next ones of its read */
    bool answered;
    pd_status status;
    grant *leased;
    char words[PD_MAX_WORDS];
} permit;

/* A slice in flight. */
struct flight {
    flight *next;
    pd_taken *taken;
    permit *permit;
    keys *keys;
    table *table;
    cursor next_piece; /* to ask the device for */
    unsigned under_way;  /* batches; of a WRITE: the answer */
    bool judged, posted, failed; /* posted: all of it. failed: what is under way is for nothing */
    int64_t unwanted;            /* since when; 0: it is wanted */
    uint64_t serial;             /* of its WRITE */
    int64_t asked;               /* when that was sent; 0: it reads */
    uint64_t tag;
    pd_lease lease;
    unsigned char capability[PD_MAX_CAPABILITY];
    size_t count;
    uint64_t bytes;
    pd_piece pieces[PD_SLICE_PIECES];
};

typedef enum { DIALLING, JOINING, TRYING, OPEN, BREAKING, PAUSED } lane_state;

/* One queue pair to an owner, and the connection beside it. */
struct lane {
    wire wire; /* first */
    queue queue;
    peer *peer;
    rail *rail;
    uint32_t remote; /* rail of the owner */
    lane_state state;
    int64_t deadline; /* of the state; OPEN: none */
    int64_t progress; /* when something came last */
    bool was_down;
    bool fenced; /* broken by us, for a read that would not end: to be joined again at once */
    uint32_t place;   /* in the rail's scratch memory */
    table *table;
    verbs_joined joined;
    permit *permits;
    flight *flights, **last;
    unsigned count;
    char words[PD_MAX_WORDS];
};

struct peer {
    peer *next;
    verbs *verbs;
    uint64_t number;
    _Atomic int refs;
    atomic_bool gone; /* the core wants it no more */
    bool lost, dialled;
    verbs_where where;
    flight *orphans; /* of lanes that broke */
    int num_lanes;
    lane lanes[];
};

void lane_start(lane *each);
void lane_turn(lane *each, bool woken); /* what is due now */
int64_t lane_deadline(const lane *each);
void lane_fail(lane *each, const char *words);
void lane_stop(lane *each, pd_status status, const char *words); /* at once, with all of its flights */

/* verbs_flight.c */
flight *flight_next(lane *each); /* take another slice, an orphan first; NULL: there is none */
void flights_advance(lane *each);
void flight_settle(lane *each, flight *one); /* end it, if nothing of it is under way */
void flight_end(lane *each, flight *one, pd_status status, const char *words);
void permits_drop(lane *each); /* after the flights */
void flight_unlink(lane *each, flight *gone);
void flight_give(verbs *all, flight *each, pd_status status, const char *words);

#endif
