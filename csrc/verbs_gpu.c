/* Memory of NVIDIA's GPUs in the verbs backend (GPUDirect RDMA): RDMA devices read and write it where it is. Never run on
 * a GPU by us: proven against an emulation of the driver beside real verbs (tests/rdma_vm/inside/test_gpu.py). */

#include "verbs.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { GPU_MS = 3000 }; /* until a GPU that does not put runs in their places counts as failed */

static int attribute(const cuda_context *of, int which)
{
    int value = 0;
    return cuda.cuDeviceGetAttribute(&value, which, of->device) ? 0 : value;
}

static int begin(verbs *all, int device)
{
    verbs_gpu *gpu = &all->gpu;
    if (cuda_mover_open(&gpu->mover, device))
        return -EIO;
    bool flushes = attribute(&gpu->mover.context, CUDA_DEVICE_WRITES_ORDERING) < CUDA_ORDERED_FOR_OWNER;
    int options = attribute(&gpu->mover.context, CUDA_DEVICE_FLUSH_OPTIONS);
    if (flushes && !(options & CUDA_FLUSH_BY_HOST && cuda.cuFlushGPUDirectRDMAWrites)) {
        cuda_mover_close(&gpu->mover);
        return pd_fail(ENOTSUP, "nothing tells when GPU %d sees what RDMA devices write; stage it through host memory",
                       device);
    }
    gpu->flushes = flushes;
    atomic_store(&gpu->ready, true);
    return 0;
}

int gpu_publish(verbs *all, const pd_memory *memory)
{
    bool ready = atomic_load(&all->gpu.ready);
    int device, error = cuda_device_of_all(memory, ready ? all->gpu.mover.context.device : -1, &device);
    return error || ready || device < 0 ? error : begin(all, device);
}

int gpu_dma_buf(const verbs *all, const pd_region *region, uint64_t *offset)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), first = region->address / page * page;
    uint64_t bytes = (region->address + region->length - first + page - 1) / page * page;
    int file = -1;
    void *before;
    if (!cuda.cuMemGetHandleForAddressRange)
        return pd_fail(ENOTSUP, "the GPU's driver has none, it is older than CUDA 11.7"), -1;
    if (cuda_enter(&all->gpu.mover.context, &before))
        return -1;
    cuda_error error = cuda.cuMemGetHandleForAddressRange(&file, first, bytes, CUDA_HANDLE_DMA_BUF, 0);
    cuda_leave(before);
    if (error)
        return pd_fail(EIO, "the GPU's driver has none (CUDA error %d)", error), -1;
    *offset = region->address - first;
    return file;
}

bool gpu_flush(verbs *all)
{
    void *before;
    if (!atomic_load(&all->gpu.ready) || !all->gpu.flushes)
        return true;
    if (cuda_enter(&all->gpu.mover.context, &before))
        return false;
    cuda_error error = cuda.cuFlushGPUDirectRDMAWrites(CUDA_FLUSH_CURRENT_CONTEXT, CUDA_FLUSH_TO_OWNER);
    cuda_leave(before);
    return !error || (cuda_failed("what was read is not visible to the GPU", error), false);
}

bool gpu_unpin(verbs *all, const buffer *each)
{
    if (!each->pinned)
        return true;
    if (!all->gpu.mover.stuck)
        cuda_unpin(&all->gpu.mover.context, each->bytes);
    return !all->gpu.mover.stuck;
}

/* The buffer that rows come from, as the GPU can read it; NULL after pd_fail. */
static const buffer *pinned(verbs *all, const unsigned char *at)
{
    buffer *found = all->buffers;
    while ((uint64_t)(at - found->bytes) >= PD_SLICE_BYTES)
        found = found->next;
    if (!found->pinned)
        found->pinned = !cuda_pin(&all->gpu.mover.context, found->bytes, PD_SLICE_BYTES, &found->reachable);
    return found->pinned ? found : NULL;
}

/* Rows for the host's memory by the processor, those for a GPU's by the GPU. */
pd_status verbs_place(void *own, const pd_rows *rows, size_t count)
{
    verbs *all = own;
    pd_rows there[PD_MAX_ROWS];
    size_t listed = 0;
    for (const pd_rows *each = rows; each < rows + count; each++) {
        if (each->flags & PD_OF_DEVICE) {
            there[listed++] = *each;
            continue;
        }
        for (uint64_t i = 0; i < each->count; i++)
            memcpy(each->dst + i * each->dst_stride, each->src + i * each->src_stride, each->bytes);
    }
    if (!listed)
        return PD_DONE;
    if (pd_closing(all->core)) /* one patience for a close, not one for each slice */
        return pd_fail(ECANCELED, "this agent closes"), PD_ERROR;
    const buffer *from = pinned(all, there[0].src);
    if (!from || cuda_mover_place(&all->gpu.mover, there, listed, from->reachable, GPU_MS, all->core))
        return PD_ERROR;
    return PD_DONE;
}

void gpu_close(verbs *all)
{
    if (all->gpu.mover.stuck)
        pd_abandon(all->core);
    cuda_mover_close(&all->gpu.mover);
}
