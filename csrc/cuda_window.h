/* Memory of GPUs between processes of one host: what an owner tells of its own, and what a reader makes of that. */
#ifndef PD_CUDA_WINDOW_H
#define PD_CUDA_WINDOW_H

#include "cuda_mover.h"
#include "service.h"

/* An owner's memory as it was told once, at addresses that are good in this process. */
typedef struct {
    _Atomic int refs;
    uint64_t generation;
    pd_memory *memory;
    bool reachable; /* for kernels of our GPU */
    size_t num_opened;
    cuda_pointer *opened; /* one per region, of another process's */
} cuda_window;

/* How other processes find these regions, one per region; NULL after pd_fail. In the context. */
service_export *cuda_export(const pd_memory *memory);
/* `ours`: the owner is this very process, whose handles cannot be opened here. NULL after pd_fail. */
cuda_window *cuda_window_open(const cuda_mover *by, const directory *known, bool ours);
void cuda_window_release(const cuda_mover *by, cuda_window *each); /* also NULL */

#endif
