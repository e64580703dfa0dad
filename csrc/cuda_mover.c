/* See cuda_mover.h. */

#include "cuda_mover.h"

#include "cuda_gather.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Not measured on a GPU: a copy costs the engine some two microseconds whatever its size, a warp of the kernel moves 32
 * KiB in about ten. */
enum { GATHER_BYTES = 32 << 10, GATHER_LEAST = 8 };
enum { LANE_MOVES = 4096, PAGE = 4096, WARPS = 8, BLOCKS = 512 };
enum { CUDA_NOT_SUPPORTED = 801 };

struct cuda_lane {
    struct cuda_lane *next;
    void *stream;
    pd_move *list;          /* pinned, and its copy on the GPU; made when the kernel is first needed */
    cuda_pointer on_device; /* 0: there is none */
    cuda_pointer dsts[LANE_MOVES], srcs[LANE_MOVES];
    size_t sizes[LANE_MOVES], listed, batched;
};

_Static_assert(sizeof(pd_move) == 24, "as the kernel reads it");

/* --- lanes, their user in the context ----------------------------------------------------------------------------- */

static void lane_free(cuda_lane *each)
{
    if (each->stream)
        cuda.cuStreamDestroy_v2(each->stream);
    if (each->on_device) {
        cuda.cuMemFree_v2(each->on_device);
        cuda.cuMemHostUnregister(each->list);
    }
    free(each->list);
    free(each);
}

static cuda_lane *lane_make(void)
{
    cuda_lane *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory for a stream"), NULL;
    cuda_error error = cuda.cuStreamCreate(&made->stream, CUDA_STREAM_NON_BLOCKING);
    if (error) {
        cuda_failed("no stream", error);
        free(made);
        return NULL;
    }
    return made;
}

/* Where the kernel finds its moves; false: do without it. */
static bool lane_lists(cuda_lane *each)
{
    size_t bytes = LANE_MOVES * sizeof *each->list; /* whole pages */
    if (each->on_device)
        return true;
    if (!each->list && !(each->list = aligned_alloc(PAGE, bytes)))
        return false;
    if (cuda.cuMemHostRegister_v2(each->list, bytes, CUDA_HOST_PORTABLE))
        return false;
    if (!cuda.cuMemAlloc_v2(&each->on_device, bytes))
        return true;
    each->on_device = 0;
    cuda.cuMemHostUnregister(each->list);
    return false;
}

static cuda_lane *take(cuda_mover *each)
{
    pthread_mutex_lock(&each->lock);
    cuda_lane *lane = each->unused;
    if (lane)
        each->unused = lane->next;
    pthread_mutex_unlock(&each->lock);
    return lane ? lane : lane_make();
}

/* --- a batch on a lane -------------------------------------------------------------------------------------------- */

static cuda_error copy_batch(cuda_mover *each, cuda_lane *lane)
{
    if (lane->batched > 1 && cuda.cuMemcpyBatchAsync && !atomic_load(&each->no_batches)) {
        cuda_batch kind = {.order = CUDA_ORDER_OF_STREAM};
        size_t first = 0, failed = 0;
        cuda_error error = cuda.cuMemcpyBatchAsync(lane->dsts, lane->srcs, lane->sizes, lane->batched, &kind, &first, 1,
                                                   &failed, lane->stream);
        if (error != CUDA_NOT_SUPPORTED)
            return error;
        atomic_store(&each->no_batches, true);
    }
    cuda_error error = 0;
    for (size_t i = 0; !error && i < lane->batched; i++)
        error = cuda.cuMemcpyAsync(lane->dsts[i], lane->srcs[i], lane->sizes[i], lane->stream);
    return error;
}

static cuda_error gather(const cuda_mover *each, cuda_lane *lane)
{
    cuda_pointer list = (uintptr_t)lane->list;
    cuda_error error = cuda.cuMemcpyAsync(lane->on_device, list, lane->listed * sizeof *lane->list, lane->stream);
    if (error)
        return error;
    uint64_t count = lane->listed;
    void *parameters[] = {&lane->on_device, &count};
    unsigned blocks = (unsigned)((count + WARPS - 1) / WARPS);
    return cuda.cuLaunchKernel(each->kernel, blocks < BLOCKS ? blocks : BLOCKS, 1, 1, WARPS * 32, 1, 1, 0, lane->stream,
                               parameters, NULL);
}

static cuda_error issue(cuda_mover *each, cuda_lane *lane, const pd_move *moves, size_t count, bool reachable)
{
    size_t few = 0;
    for (size_t i = 0; i < count; i++)
        few += moves[i].bytes <= GATHER_BYTES;
    bool by_kernel = reachable && each->kernel && few >= GATHER_LEAST && lane_lists(lane);
    lane->listed = lane->batched = 0;
    for (size_t i = 0; i < count; i++) {
        if (by_kernel && moves[i].bytes <= GATHER_BYTES) {
            lane->list[lane->listed++] = moves[i];
        } else if (moves[i].bytes) {
            lane->dsts[lane->batched] = moves[i].dst, lane->srcs[lane->batched] = moves[i].src;
            lane->sizes[lane->batched++] = moves[i].bytes;
        }
    }
    cuda_error error = lane->listed ? gather(each, lane) : 0;
    return error || !lane->batched ? error : copy_batch(each, lane);
}

/* --- waiting ------------------------------------------------------------------------------------------------------ */

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

/* Whether the context is gone, and with it all that was under way; after any other error something may still be. */
static bool lost(cuda_error error)
{
    static const cuda_error last[] = {4,   201, 214, 220, 226, 400, 700, 702, 709, 710,
                                      714, 715, 716, 717, 718, 719, 809, 911};
    for (size_t i = 0; i < sizeof last / sizeof *last; i++)
        if (error == last[i])
            return true;
    return false;
}

/* Until the stream is empty: 0, what failed, or CUDA_NOT_READY when it was given up. By looking, with naps in between:
 * what the driver has for waiting knows no deadline. */
static cuda_error wait(void *stream, int milliseconds, pd_transport *core, bool *late)
{
    enum { FIRST_NAP_US = 10, NAP_US = 500, LATE_NAP_US = 10000, CUDA_LAST_MS = 10000 };
    int64_t end = milliseconds ? now_us() + milliseconds * 1000ll : INT64_MAX, nap = FIRST_NAP_US;
    cuda_error first = 0;
    *late = false;
    for (;;) {
        cuda_error error = cuda.cuStreamQuery(stream);
        if (!error || lost(error))
            return error ? error : first;
        first = error != CUDA_NOT_READY && !first ? error : first;
        *late = now_us() >= end;
        if (core && pd_closing_for(core, *late ? 0 : CUDA_LAST_MS))
            return CUDA_NOT_READY;
        struct timespec pause = {0, (*late ? LATE_NAP_US : nap) * 1000};
        nanosleep(&pause, NULL);
        nap = nap * 2 < NAP_US ? nap * 2 : NAP_US;
    }
}

static int run(cuda_mover *each, cuda_lane *lane, const pd_move *moves, size_t count, bool reachable, int milliseconds,
               pd_transport *core)
{
    bool late;
    cuda_error error = issue(each, lane, moves, count, reachable);
    cuda_error last = wait(lane->stream, milliseconds, core, &late); /* also after an error: some may be under way */
    if (last == CUDA_NOT_READY)
        return pd_fail(ETIMEDOUT, "the GPU did not copy within %d ms, and may still: see nvidia-smi and dmesg",
                       milliseconds);
    if (error || last)
        return cuda_failed("the GPU did not copy", error ? error : last);
    return late ? pd_fail(ETIME, "the GPU took longer than %d ms to copy: see nvidia-smi", milliseconds) : 0;
}

int cuda_mover_run(cuda_mover *each, const pd_move *moves, size_t count, bool reachable, int milliseconds,
                   pd_transport *core)
{
    void *before;
    if (cuda_enter(&each->context, &before))
        return -EIO;
    cuda_lane *lane = take(each);
    int error = lane ? 0 : -EIO;
    for (size_t done = 0; !error && done < count; done += LANE_MOVES) {
        size_t most = count - done < LANE_MOVES ? count - done : LANE_MOVES;
        error = run(each, lane, moves + done, most, reachable, milliseconds, core);
    }
    if (lane && error && error != -ETIME && error != -ETIMEDOUT) {
        char words[PD_MAX_WORDS];
        memcpy(words, pd_last_error(), sizeof words);
        lane_free(lane); /* what it still holds of the failure is not the next one's */
        pd_fail(EIO, "%s", words);
    } else if (lane) {
        pthread_mutex_lock(&each->lock);
        if (error == -ETIMEDOUT) {
            each->stuck++;
        } else {
            lane->next = each->unused;
            each->unused = lane;
        }
        pthread_mutex_unlock(&each->lock);
    }
    cuda_leave(before);
    return error;
}

int cuda_mover_place(cuda_mover *each, const pd_rows *rows, size_t count, bool reachable, int milliseconds,
                     pd_transport *core)
{
    enum { MOVES = 1024 };
    pd_move moves[MOVES];
    size_t listed = 0;
    int error = 0;
    for (const pd_rows *row = rows; !error && row < rows + count; row++)
        for (uint64_t i = 0; !error && i < row->count; i++) {
            moves[listed++] = (pd_move){(uintptr_t)row->dst + i * row->dst_stride,
                                        (uintptr_t)row->src + i * row->src_stride, row->bytes};
            if (listed < MOVES)
                continue;
            error = cuda_mover_run(each, moves, listed, reachable, milliseconds, core);
            listed = 0;
        }
    return error || !listed ? error : cuda_mover_run(each, moves, listed, reachable, milliseconds, core);
}

/* --- the whole ---------------------------------------------------------------------------------------------------- */

int cuda_mover_open(cuda_mover *out, int ordinal)
{
    cuda_mover made = {.open = true};
    void *before;
    int error = cuda_context_open(&made.context, ordinal);
    if (error)
        return error;
    if (cuda_enter(&made.context, &before)) {
        cuda_context_close(&made.context);
        return -EIO;
    }
    if (cuda.cuModuleLoadData(&made.module, cuda_gather_ptx))
        made.module = NULL;
    if (made.module && cuda.cuModuleGetFunction(&made.kernel, made.module, cuda_gather_name))
        made.kernel = NULL;
    cuda_leave(before);
    *out = made;
    pthread_mutex_init(&out->lock, NULL);
    return 0;
}

void cuda_mover_close(cuda_mover *each)
{
    void *before;
    if (!each->open)
        return;
    /* What the GPU may still use stays, context and all: to free any of it would wait for the GPU. */
    if (!each->stuck && !cuda_enter(&each->context, &before)) {
        while (each->unused) {
            cuda_lane *lane = each->unused;
            each->unused = lane->next;
            lane_free(lane);
        }
        if (each->module)
            cuda.cuModuleUnload(each->module);
        cuda_leave(before);
    }
    if (!each->stuck)
        cuda_context_close(&each->context);
    pthread_mutex_destroy(&each->lock);
    *each = (cuda_mover){.open = false};
}
