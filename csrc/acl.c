/* See acl.h. */

#include "acl.h"

#include "dl.h"

#include <errno.h>
#include <unistd.h>

acl_library acl;

#define SYMBOL(name) {#name, offsetof(acl_library, name), false}
#define NEWER(name) {#name, offsetof(acl_library, name), true}

static const pd_symbol symbols[] = {
    SYMBOL(aclrtSetDevice), SYMBOL(aclrtGetDevice), SYMBOL(aclrtGetCurrentContext), SYMBOL(aclrtSetCurrentContext),
    SYMBOL(aclrtMalloc), SYMBOL(aclrtFree), SYMBOL(aclrtHostRegister), SYMBOL(aclrtHostUnregister),
    SYMBOL(aclrtMemcpyAsync), NEWER(aclrtMemcpy2dAsync), NEWER(aclrtMemcpyBatchAsync), SYMBOL(aclrtCreateStream),
    SYMBOL(aclrtDestroyStream), SYMBOL(aclrtSynchronizeStreamWithTimeout), SYMBOL(aclrtPointerGetAttributes),
    NEWER(aclGetRecentErrMsg),
};

int acl_load(void)
{
    static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&opening);
    int error = 0;
    if (!acl.aclrtSetDevice) {
        acl_library found;
        error = pd_dl_open("libascendcl.so", symbols, sizeof symbols / sizeof *symbols, &found);
        if (!error)
            acl = found;
    }
    pthread_mutex_unlock(&opening);
    return error;
}

static const char *remedy(acl_error error)
{
    switch (error) {
    case ACL_BAD_ARGUMENT: return "an address or size that the device does not know";
    case ACL_NO_CONTEXT: return "no device is set on this thread";
    case ACL_SYNC_TIMEOUT: return "the device did not finish in time";
    case ACL_NOT_SUPPORTED: return "this driver cannot do that";
    case 207001: return "the device has no memory left: lower gpu_memory_utilization";
    case 507899: return "the driver failed: see npu-smi info and the plog";
    default: return "see aclError in the CANN documentation";
    }
}

int acl_failed(const char *what, acl_error error)
{
    const char *words = acl.aclGetRecentErrMsg ? acl.aclGetRecentErrMsg() : NULL;
    return pd_fail(EIO, "%s: AscendCL error %d (%s)%s%.80s", what, error, remedy(error), words && *words ? ": " : "",
                   words ? words : "");
}

int acl_device_of(const void *at)
{
    acl_pointer found;
    return acl.aclrtPointerGetAttributes(at, &found) || found.location.type != ACL_LOCATION_DEVICE ? -1 : (int)found.location.id;
}

int acl_device_of_region(const pd_region *region)
{
    if (!(region->flags & PD_OF_DEVICE))
        return -1;
    int found = region->device >= 0 ? region->device : acl_device_of((const void *)(uintptr_t)region->address);
    if (found >= 0)
        return found;
    pd_fail(EINVAL, "AscendCL does not say which device memory at %#llx is of: give the region its device",
            (unsigned long long)region->address);
    return -2;
}

int acl_device_of_all(const pd_memory *memory, int before, int *out)
{
    *out = -1;
    for (size_t i = 0; i < memory->num_regions; i++) {
        int on = acl_device_of_region(&memory->regions[i]);
        if (on < -1)
            return -EINVAL;
        if (on >= 0 && *out >= 0 && on != *out)
            return pd_fail(EINVAL, "memory of devices %d and %d: an agent serves one", *out, on);
        *out = on >= 0 ? on : *out;
    }
    if (before >= 0 && *out >= 0 && *out != before)
        return pd_fail(EINVAL, "memory of device %d: this agent's was of device %d", *out, before);
    return 0;
}

void *acl_context(int device)
{
    void *context = NULL;
    acl_error error = acl.aclrtSetDevice(device);
    if (!error)
        error = acl.aclrtGetCurrentContext(&context);
    if (error)
        return acl_failed("the device cannot be used", error), NULL;
    return context;
}

int acl_enter(void *context)
{
    /* Asked each time: a thread may serve several transports, and an engine may have changed it. */
    void *current = NULL;
    if (!acl.aclrtGetCurrentContext(&current) && current == context)
        return 0;
    acl_error error = acl.aclrtSetCurrentContext(context);
    return error ? acl_failed("the device cannot be used by this thread", error) : 0;
}

acl_error acl_drain(void **stream, pd_transport *core)
{
    enum { LOOK_MS = 500, ASKED = 3, NAP_MS = 50 };
    acl_error first = 0;
    for (int refused = 0;;) {
        acl_error last = acl.aclrtSynchronizeStreamWithTimeout(*stream, LOOK_MS);
        if (!last)
            return first; /* also after an error: that was its word about what went before */
        if (last != ACL_SYNC_TIMEOUT) {
            first = first ? first : last;
            if (++refused >= ASKED && !acl.aclrtDestroyStream(*stream)) {
                *stream = NULL;
                return first;
            }
            usleep(NAP_MS * 1000);
        }
        if (core && pd_closing_for(core, ACL_LAST_MS))
            return ACL_SYNC_TIMEOUT;
    }
}

static atomic_bool no_rows;

bool acl_rows_work(void)
{
    return acl.aclrtMemcpy2dAsync && !atomic_load(&no_rows);
}

void acl_rows_fail(void)
{
    atomic_store(&no_rows, true);
}

/* --- scratch memory ----------------------------------------------------------------------------------------------- */

int acl_scratch_open(acl_scratch *out, pd_transport *core, void *context, int count)
{
    void *at = NULL, *stream = NULL;
    acl_error error = acl.aclrtMalloc(&at, (size_t)count * PD_MAX_SLICE_BYTES, ACL_HUGE_FIRST);
    if (error)
        return acl_failed("no device memory for buffers", error);
    error = acl.aclrtCreateStream(&stream);
    if (error) {
        acl.aclrtFree(at);
        return acl_failed("no stream", error);
    }
    *out = (acl_scratch){.context = context, .core = core, .stream = stream, .buffers = at, .count = (size_t)count};
    pthread_mutex_init(&out->lock, NULL);
    return 0;
}

void acl_scratch_close(acl_scratch *each)
{
    if (each->stuck || !each->buffers || acl_enter(each->context))
        return;
    if (each->stream)
        acl.aclrtDestroyStream(each->stream);
    acl.aclrtFree(each->buffers);
    pthread_mutex_destroy(&each->lock);
}

unsigned char *acl_scratch_lend(acl_scratch *each)
{
    if (each->lent == each->count)
        return pd_fail(ENOMEM, "no buffer is left"), NULL;
    return each->buffers + each->lent++ * PD_MAX_SLICE_BYTES;
}

static acl_error place(acl_scratch *each, const pd_rows *rows)
{
    int kind = acl_device_of(rows->dst) < 0 ? ACL_DEVICE_TO_HOST : ACL_DEVICE_TO_DEVICE;
    bool flat = rows->count > 1 && rows->dst_stride >= rows->bytes && rows->src_stride >= rows->bytes;
    acl_error error = 0;
    if (flat && acl_rows_work() && !acl.aclrtMemcpy2dAsync(rows->dst, rows->dst_stride, rows->src, rows->src_stride, rows->bytes,
                                                           rows->count, kind, each->stream))
        return 0;
    if (flat)
        acl_rows_fail();
    for (uint64_t i = 0; !error && i < rows->count; i++)
        error = acl.aclrtMemcpyAsync(rows->dst + i * rows->dst_stride, rows->bytes, rows->src + i * rows->src_stride,
                                     rows->bytes, kind, each->stream);
    return error;
}

pd_status acl_scratch_place(acl_scratch *each, const pd_rows *rows, size_t count)
{
    if (acl_enter(each->context))
        return PD_ERROR;
    pthread_mutex_lock(&each->lock);
    acl_error error = 0, last = 0;
    bool refused = pd_closing(each->core); /* one patience for a close, not one for each slice */
    if (!refused && !each->stream)
        error = acl.aclrtCreateStream(&each->stream);
    if (!refused && !error) { /* without a stream of its own it would be the context's, which nobody waits for */
        for (size_t i = 0; !error && i < count; i++)
            error = place(each, &rows[i]);
        last = acl_drain(&each->stream, each->core);
    }
    each->stuck |= last == ACL_SYNC_TIMEOUT;
    if (last == ACL_SYNC_TIMEOUT)
        pd_abandon(each->core);
    pthread_mutex_unlock(&each->lock);
    error = error ? error : last;
    if (refused)
        return pd_fail(ECANCELED, "this agent closes"), PD_ERROR;
    return error ? acl_failed("what was read is not put in its places", error), PD_ERROR : PD_DONE;
}
