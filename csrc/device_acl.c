/* An NPU as a device: copies in batches by AscendCL. Never run on an NPU by us: proven against an emulation
 * (tests/ascend_emulated). */

#include "acl.h"
#include "device.h"

#include <errno.h>
#include <stdlib.h>

enum { BATCH = 1024, ROWS = 4 };

typedef struct { /* one per direction */
    pthread_mutex_t lock;
    void *stream;
} lane;

typedef struct {
    int index;
    void *context;
    lane lanes[PD_ON_DEVICE + 1];
    atomic_bool batches; /* the driver copies in batches */
} npu;

static int index_of(const void *at)
{
    return acl_load() ? -1 : acl_device_of(at);
}

static void close_(void *own)
{
    npu *each = own;
    bool entered = !acl_enter(each->context);
    for (int i = 0; i <= PD_ON_DEVICE; i++) {
        if (entered && each->lanes[i].stream)
            acl.aclrtDestroyStream(each->lanes[i].stream);
        pthread_mutex_destroy(&each->lanes[i].lock);
    }
    free(each);
}

static void *open_(int index)
{
    int32_t current = 0;
    if (index < 0 && !acl.aclrtGetDevice(&current))
        index = current;
    void *context = acl_context(index < 0 ? 0 : index);
    npu *made = context ? calloc(1, sizeof *made) : NULL;
    if (!made)
        return context ? (pd_fail(ENOMEM, "no memory"), NULL) : NULL;
    made->index = index < 0 ? 0 : index;
    made->context = context;
    atomic_init(&made->batches, acl.aclrtMemcpyBatchAsync != NULL);
    acl_error error = 0;
    for (int i = 0; i <= PD_ON_DEVICE; i++) {
        pthread_mutex_init(&made->lanes[i].lock, NULL);
        error = error ? error : acl.aclrtCreateStream(&made->lanes[i].stream);
    }
    if (!error)
        return made;
    acl_failed("no stream", error);
    return close_(made), NULL;
}

static void *alloc(void *own, size_t bytes)
{
    void *at = NULL;
    acl_error error = acl_enter(((npu *)own)->context) ? 0 : acl.aclrtMalloc(&at, bytes, ACL_HUGE_FIRST);
    if (error)
        acl_failed("no memory of the device", error);
    return at;
}

static void release(void *own, void *at)
{
    if (!acl_enter(((npu *)own)->context))
        acl.aclrtFree(at);
}

static int pin(void *own, void *at, size_t bytes)
{
    void *on_device;
    if (acl_enter(((npu *)own)->context))
        return -EIO;
    acl_error error = acl.aclrtHostRegister(at, bytes, ACL_HOST_MAPPED, &on_device);
    return error ? acl_failed("host memory cannot be pinned", error) : 0;
}

static void unpin(void *own, void *at)
{
    if (!acl_enter(((npu *)own)->context))
        acl.aclrtHostUnregister(at);
}

/* --- copies ------------------------------------------------------------------------------------------------------- */

static int kind_of(pd_direction which)
{
    return which == PD_TO_HOST ? ACL_DEVICE_TO_HOST : which == PD_TO_DEVICE ? ACL_HOST_TO_DEVICE : ACL_DEVICE_TO_DEVICE;
}

/* How many moves from the first on are rows of equal length, a stride apart on each side: one copy of two dimensions. */
static size_t rows_of(const pd_move *moves, size_t count)
{
    size_t rows = 1;
    while (rows < count && moves[rows].bytes == moves->bytes && moves[rows].dst > moves[rows - 1].dst &&
           moves[rows].src > moves[rows - 1].src && moves[rows].dst - moves[rows - 1].dst == moves[1].dst - moves[0].dst &&
           moves[rows].src - moves[rows - 1].src == moves[1].src - moves[0].src)
        rows++;
    bool apart = rows > 1 && moves[1].dst - moves[0].dst >= moves->bytes && moves[1].src - moves[0].src >= moves->bytes;
    return apart ? rows : 1;
}

static acl_error copy(const pd_move *move, int kind, void *stream)
{
    return acl.aclrtMemcpyAsync((void *)(uintptr_t)move->dst, move->bytes, (const void *)(uintptr_t)move->src, move->bytes, kind,
                                stream);
}

static acl_error copy_rows(const pd_move *moves, size_t rows, int kind, void *stream)
{
    return acl.aclrtMemcpy2dAsync((void *)(uintptr_t)moves->dst, moves[1].dst - moves[0].dst, (const void *)(uintptr_t)moves->src,
                                  moves[1].src - moves[0].src, moves->bytes, rows, kind, stream);
}

/* ACL_NOT_SUPPORTED: this driver has the function, but does not do it. */
static acl_error copy_batch(const npu *each, const pd_move *moves, size_t count, pd_direction which, void *stream)
{
    void *dsts[BATCH], *srcs[BATCH];
    size_t sizes[BATCH], first = 0, failed = 0;
    acl_location host = {0, ACL_LOCATION_HOST}, device = {(uint32_t)each->index, ACL_LOCATION_DEVICE};
    acl_batch ends = {which == PD_TO_HOST ? host : device, which == PD_TO_HOST ? device : host, {0}};
    for (size_t i = 0; i < count; i++) {
        dsts[i] = (void *)(uintptr_t)moves[i].dst;
        srcs[i] = (void *)(uintptr_t)moves[i].src;
        sizes[i] = moves[i].bytes;
    }
    return acl.aclrtMemcpyBatchAsync(dsts, sizes, srcs, sizes, count, &ends, &first, 1, &failed, stream);
}

/* Hand the copies to the stream: rows at once, the others in batches, or one by one. */
static acl_error hand_over(npu *each, const pd_move *moves, size_t count, pd_direction which, void *stream)
{
    int kind = kind_of(which);
    acl_error error = 0;
    for (size_t at = 0, next; at < count && !error; at = next) {
        size_t rows = acl_rows_work() ? rows_of(moves + at, count - at) : 1;
        next = at + rows;
        if (rows >= ROWS && !copy_rows(moves + at, rows, kind, stream))
            continue;
        if (rows >= ROWS)
            acl_rows_fail();
        next = rows >= ROWS ? at + 1 : next;
        while (next < count && next - at < BATCH && (!acl_rows_work() || rows_of(moves + next, count - next) < ROWS))
            next++;
        bool batched = which != PD_ON_DEVICE && next - at > 1 && atomic_load(&each->batches);
        if (batched)
            error = copy_batch(each, moves + at, next - at, which, stream);
        if (batched && error == ACL_NOT_SUPPORTED) {
            atomic_store(&each->batches, false);
            batched = false, error = 0;
        }
        for (size_t i = at; i < next && !batched && !error; i++)
            error = copy(&moves[i], kind, stream);
    }
    return error;
}

static int move(void *own, const pd_move *moves, size_t count, pd_direction which)
{
    npu *each = own;
    if (acl_enter(each->context))
        return -EIO;
    lane *with = &each->lanes[which];
    pthread_mutex_lock(&with->lock);
    acl_error error = with->stream ? 0 : acl.aclrtCreateStream(&with->stream);
    error = error ? error : hand_over(each, moves, count, which, with->stream);
    /* Also after an error, for what was handed over before it moves. A device that never ends holds this thread, and whoever
     * waits for it gives the memory up: to return would let it be used again. */
    acl_error last = with->stream ? acl_drain(&with->stream, NULL) : 0;
    pthread_mutex_unlock(&with->lock);
    error = error ? error : last;
    return error ? acl_failed("a copy failed", error) : 0;
}

const pd_device_kind pd_acl = {
    .name = "acl",
    .probe = acl_load,
    .index_of = index_of,
    .open = open_,
    .close = close_,
    .alloc = alloc,
    .release = release,
    .pin = pin,
    .unpin = unpin,
    .move = move,
};
