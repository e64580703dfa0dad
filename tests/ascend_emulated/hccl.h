/*
 * The emulated communicator: hccl_group.c brings its ranks together, hccl.c is its interface and its operations.
 *
 * Every rank has a connection to every other one for what it sends there and the acknowledgements of it. A send
 * ends with the acknowledgement, so it lasts until the partner's receive has taken the bytes.
 */
#ifndef PD_ASCEND_HCCL_H
#define PD_ASCEND_HCCL_H

#include <pthread.h>

#include "emu.h"

enum {
    HCCL_OK = 0,
    HCCL_PARA = 1,
    HCCL_PTR = 2,
    HCCL_INTERNAL = 4,
    HCCL_NOT_SUPPORTED = 5,
    HCCL_TIMEOUT = 9,
    HCCL_TCP_CONNECT = 11,
    HCCL_TCP_TRANSFER = 13,
    HCCL_RUNTIME = 15,
    HCCL_REMOTE = 21,
};

#define MAX_RANKS 64

typedef struct {
    char internal[4108];
} HcclRootInfo;

/* One direction between two ranks; the lock is held for the length of an operation. */
typedef struct {
    int fd;
    pthread_mutex_t lock;
} lane;

typedef struct comm {
    struct comm *next;
    uint32_t rank, ranks;
    lane to[MAX_RANKS], from[MAX_RANKS];
    int holders; /* the user, and every operation that is queued */
    int error;   /* what HcclGetCommAsyncError tells */
    bool destroyed;
} comm;

int64_t hccl_seconds(const char *variable, int64_t otherwise);
int hccl_open_root(HcclRootInfo *info);
/* Fills the lanes of a communicator that has its rank and number of ranks. */
int hccl_gather(comm *self, const HcclRootInfo *info, int64_t deadline);

#endif
