/* NVIDIA's GPUs as devices. Never run on a GPU by us: proven against an emulation (tests/cuda_emulated). */

#include "cuda_mover.h"

#include <errno.h>
#include <stdlib.h>

enum { PAGE = 4096 };

typedef struct pinned {
    struct pinned *next;
    uint64_t at, bytes;
    bool reachable; /* kernels find it at the same address */
} pinned;

typedef struct {
    cuda_mover mover;
    pthread_rwlock_t lock; /* guards the list */
    pinned *pinned;
} gpu;

static int current_ordinal(void)
{
    int device = 0;
    return cuda.cuCtxGetDevice(&device) ? 0 : device; /* a thread that has none yet would get the first */
}

static int index_of(const void *at)
{
    return cuda_probe() ? -1 : cuda_device_of((uintptr_t)at);
}

static int pci(int index, char *out, int room)
{
    int device;
    if (cuda_probe())
        return -ENODEV;
    cuda_error error = cuda.cuDeviceGet(&device, index);
    if (!error)
        error = cuda.cuDeviceGetPCIBusId(out, room, device);
    return error ? cuda_failed("the GPU has no PCI address", error) : 0;
}

static void *open_(int index)
{
    gpu *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory for a device"), NULL;
    if (cuda_mover_open(&made->mover, index < 0 ? current_ordinal() : index)) {
        free(made);
        return NULL;
    }
    pthread_rwlock_init(&made->lock, NULL);
    return made;
}

static void close_(void *own)
{
    gpu *each = own;
    while (each->pinned) {
        pinned *gone = each->pinned;
        each->pinned = gone->next;
        cuda_unpin(&each->mover.context, (void *)(uintptr_t)gone->at);
        free(gone);
    }
    cuda_mover_close(&each->mover);
    pthread_rwlock_destroy(&each->lock);
    free(each);
}

/* The driver promises no more than 256 bytes, so a page more is asked for than is given. */
static void *alloc(void *own, size_t bytes)
{
    gpu *each = own;
    cuda_pointer at = 0;
    void *before;
    if (bytes > SIZE_MAX - PAGE)
        return pd_fail(ENOMEM, "no memory of %zu bytes", bytes), NULL;
    if (cuda_enter(&each->mover.context, &before))
        return NULL;
    cuda_error error = cuda.cuMemAlloc_v2(&at, bytes + PAGE);
    cuda_leave(before);
    if (error)
        return cuda_failed("no memory on the GPU", error), NULL;
    return (void *)(uintptr_t)((at + PAGE - 1) / PAGE * PAGE);
}

static void release(void *own, void *at)
{
    gpu *each = own;
    cuda_pointer base = 0;
    void *before;
    if (cuda_enter(&each->mover.context, &before))
        return;
    if (!cuda.cuMemGetAddressRange_v2(&base, NULL, (uintptr_t)at))
        cuda.cuMemFree_v2(base);
    cuda_leave(before);
}

static int pin(void *own, void *at, size_t bytes)
{
    gpu *each = own;
    pinned *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory");
    *made = (pinned){NULL, (uintptr_t)at, bytes, false};
    int error = cuda_pin(&each->mover.context, at, bytes, &made->reachable);
    if (error) {
        free(made);
        return error;
    }
    pthread_rwlock_wrlock(&each->lock);
    made->next = each->pinned;
    each->pinned = made;
    pthread_rwlock_unlock(&each->lock);
    return 0;
}

static void unpin(void *own, void *at)
{
    gpu *each = own;
    pinned *gone;
    pthread_rwlock_wrlock(&each->lock);
    pinned **link = &each->pinned;
    while (*link && (*link)->at != (uintptr_t)at)
        link = &(*link)->next;
    if ((gone = *link))
        *link = gone->next;
    pthread_rwlock_unlock(&each->lock);
    if (gone)
        cuda_unpin(&each->mover.context, at);
    free(gone);
}

/* Whether kernels may touch the host's end of every move: an address that they cannot reach would cost the process its
 * context. */
static bool reachable(gpu *each, const pd_move *moves, size_t count, pd_direction which)
{
    bool fine = true;
    pthread_rwlock_rdlock(&each->lock);
    for (size_t i = 0; fine && i < count; i++) {
        uint64_t at = which == PD_TO_HOST ? moves[i].dst : moves[i].src;
        const pinned *found = each->pinned;
        while (found && (at < found->at || at - found->at >= found->bytes ||
                         moves[i].bytes > found->bytes - (at - found->at)))
            found = found->next;
        fine = found && found->reachable;
    }
    pthread_rwlock_unlock(&each->lock);
    return fine;
}

static int move(void *own, const pd_move *moves, size_t count, pd_direction which)
{
    gpu *each = own;
    bool by_kernel = which == PD_ON_DEVICE || reachable(each, moves, count, which);
    /* A GPU that never ends holds this thread, and whoever waits for it gives the memory up: to return would let it be used
     * again. */
    return cuda_mover_run(&each->mover, moves, count, by_kernel, 0, NULL);
}

const pd_device_kind pd_cuda = {
    .name = "cuda",
    .probe = cuda_probe,
    .index_of = index_of,
    .pci = pci,
    .open = open_,
    .close = close_,
    .alloc = alloc,
    .release = release,
    .pin = pin,
    .unpin = unpin,
    .move = move,
};
