/* Moves between memory that one GPU reaches, in batches, each on a stream of its own: long ones by the copy engine,
 * many short ones by our kernel (cuda_gather.h). Any thread, several at once. */
#ifndef PD_CUDA_MOVER_H
#define PD_CUDA_MOVER_H

#include "cuda.h"
#include "device.h"

#include <pthread.h>

typedef struct cuda_lane cuda_lane;

typedef struct {
    cuda_context context;
    void *module, *kernel; /* NULL: the driver does not take it, and the copy engine does everything */
    atomic_bool no_batches; /* the driver has the function, but cannot */
    pthread_mutex_t lock; /* guards the list */
    cuda_lane *unused;
    atomic_uint stuck; /* lanes that were given up while the GPU may still use them */
    bool open;
} cuda_mover;

int cuda_mover_open(cuda_mover *out, int ordinal); /* negative after pd_fail */
void cuda_mover_close(cuda_mover *each);           /* also of one that is all zero */

/* All of them, in no order; they do not overlap. `reachable`: kernels of this GPU may touch both ends. 0, or negative
 * after pd_fail. After `milliseconds` (0: never) it is an error; then it is waited for all the same until nothing of it
 * writes any more or `core` closes (NULL: none), for there is no way to end it. A close waits for 10 s at most, however
 * long `milliseconds` are. -ETIMEDOUT: it may still write. */
int cuda_mover_run(cuda_mover *each, const pd_move *moves, size_t count, bool reachable, int milliseconds,
                   pd_transport *core);
/* The same for rows. */
int cuda_mover_place(cuda_mover *each, const pd_rows *rows, size_t count, bool reachable, int milliseconds,
                     pd_transport *core);

#endif
