/* libcuda.so.1: devices, contexts, memory, copies and the one kernel, as far as csrc/cuda.h declares them; with the
 * codes and the rules that are documented. */

#include "cuda_emu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEVICES = 16, POINTER_TYPE = 2, POINTER_DEVICE_POINTER = 3, POINTER_DEVICE = 9, TYPE_HOST = 1, TYPE_DEVICE = 2 };
enum { FLUSH_OPTIONS = 117, WRITES_ORDERING = 118, TO_OWNER = 100, TO_ALL = 200, DMA_BUF = 1 };

static bool initialized, forked;
static int retained[MAX_DEVICES]; /* a context's handle is its place in here */
static int things[KINDS_OF_THINGS];
static bool apart; /* the devices do not reach each other */
static int ordering = 200, flushes = 1; /* of what RDMA devices write */
static _Thread_local int *current;

void count(thing what, int by)
{
    __atomic_add_fetch(&things[what], by, __ATOMIC_SEQ_CST);
}

EMU_API int emu_things(int what)
{
    return __atomic_load_n(&things[what], __ATOMIC_SEQ_CST);
}

EMU_API void emu_apart(int yes)
{
    apart = yes;
}

EMU_API void emu_rdma_writes(int order, int options)
{
    ordering = order, flushes = options;
}

void emu_context_forked(void)
{
    forked = initialized;
    current = NULL;
    memset(things, 0, sizeof things);
}

bool usable(void)
{
    return initialized && !forked;
}

int current_device(void)
{
    return current && *current ? (int)(current - retained) : -1;
}

static int devices(void)
{
    const char *all = getenv("CUDA_EMU_DEVICES");
    int found = all ? atoi(all) : 2;
    return found < MAX_DEVICES ? found : MAX_DEVICES;
}

bool can_access(int device, int peer)
{
    return device == peer || !apart;
}

/* --- devices and contexts ----------------------------------------------------------------------------------------- */

EMU_API cuda_error cuInit(unsigned flags)
{
    EMU_FAULT(__func__);
    (void)flags;
    if (forked)
        return NOT_INITIALIZED;
    initialized = true;
    return 0;
}

EMU_API cuda_error cuGetErrorName(cuda_error error, const char **out)
{
    static const struct {
        int code;
        const char *name;
    } names[] = {{1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {201, "CUDA_ERROR_INVALID_CONTEXT"},
                 {217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == error)
            return *out = names[i].name, 0;
    return BAD_VALUE;
}

EMU_API cuda_error cuDeviceGetCount(int *out)
{
    CALL();
    *out = devices();
    return 0;
}

EMU_API cuda_error cuDeviceGet(int *out, int ordinal)
{
    CALL();
    *out = ordinal;
    return ordinal >= 0 && ordinal < devices() ? 0 : NO_SUCH_DEVICE;
}

EMU_API cuda_error cuDeviceGetAttribute(int *out, int attribute, int device)
{
    CALL();
    if (device < 0 || device >= devices())
        return NO_SUCH_DEVICE;
    if (attribute != FLUSH_OPTIONS && attribute != WRITES_ORDERING)
        return BAD_VALUE;
    *out = attribute == FLUSH_OPTIONS ? flushes : ordering;
    return 0;
}

/* Of a device of this host's bus, if it says which: CUDA_EMU_PCI. */
EMU_API cuda_error cuDeviceGetPCIBusId(char *out, int room, int device)
{
    CALL();
    const char *address = getenv("CUDA_EMU_PCI");
    if (device < 0 || device >= devices())
        return NO_SUCH_DEVICE;
    snprintf(out, (size_t)room, "%s", address ? address : "FFFF:00:00.0");
    return 0;
}

EMU_API cuda_error cuDeviceGetUuid_v2(unsigned char *out, int device)
{
    CALL();
    memset(out, 0xE0 + device, 16);
    return 0;
}

EMU_API cuda_error cuDeviceCanAccessPeer(int *out, int device, int peer)
{
    CALL();
    *out = device != peer && can_access(device, peer);
    return 0;
}

EMU_API cuda_error cuDevicePrimaryCtxRetain(void **out, int device)
{
    CALL();
    if (device < 0 || device >= devices())
        return NO_SUCH_DEVICE;
    __atomic_add_fetch(&retained[device], 1, __ATOMIC_SEQ_CST);
    count(CONTEXTS, 1);
    *out = &retained[device];
    return 0;
}

EMU_API cuda_error cuDevicePrimaryCtxRelease_v2(int device)
{
    CALL();
    __atomic_sub_fetch(&retained[device], 1, __ATOMIC_SEQ_CST);
    count(CONTEXTS, -1);
    return 0;
}

EMU_API cuda_error cuCtxGetCurrent(void **out)
{
    CALL();
    *out = current;
    return 0;
}

EMU_API cuda_error cuCtxSetCurrent(void *context)
{
    CALL();
    size_t offset = (uintptr_t)context - (uintptr_t)retained;
    if (context && (offset >= sizeof retained || offset % sizeof *retained))
        return NO_CONTEXT;
    current = context;
    return 0;
}

EMU_API cuda_error cuCtxGetDevice(int *out)
{
    CONTEXT_CALL();
    *out = current_device();
    return 0;
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

EMU_API cuda_error cuMemAlloc_v2(cuda_pointer *out, size_t bytes)
{
    CONTEXT_CALL();
    return bytes ? memory_make(current_device(), bytes, out) : BAD_VALUE;
}

EMU_API cuda_error cuMemFree_v2(cuda_pointer at)
{
    CONTEXT_CALL();
    return memory_free(at);
}

EMU_API cuda_error cuMemHostRegister_v2(void *at, size_t bytes, unsigned flags)
{
    CONTEXT_CALL();
    (void)flags;
    return at && bytes ? memory_pin(at, bytes) : BAD_VALUE;
}

EMU_API cuda_error cuMemHostUnregister(void *at)
{
    CONTEXT_CALL();
    return memory_unpin(at);
}

EMU_API cuda_error cuPointerGetAttribute(void *out, int attribute, cuda_pointer at)
{
    CALL();
    int device = memory_device(at);
    if (device < -1)
        return BAD_VALUE;
    if (attribute == POINTER_TYPE)
        *(unsigned *)out = device < 0 ? TYPE_HOST : TYPE_DEVICE;
    else if (attribute == POINTER_DEVICE)
        *(int *)out = device < 0 ? 0 : device;
    else if (attribute == POINTER_DEVICE_POINTER)
        *(cuda_pointer *)out = at;
    else
        return BAD_VALUE;
    return 0;
}

EMU_API cuda_error cuMemGetAddressRange_v2(cuda_pointer *base, size_t *bytes, cuda_pointer at)
{
    CONTEXT_CALL();
    return memory_range(at, base, bytes) ? 0 : NOT_FOUND;
}

EMU_API cuda_error cuMemGetHandleForAddressRange(void *out, cuda_pointer at, size_t bytes, int type, unsigned long long flags)
{
    CONTEXT_CALL();
    return type == DMA_BUF && !flags ? memory_dma_buf(at, bytes, out) : BAD_VALUE;
}

EMU_API cuda_error cuFlushGPUDirectRDMAWrites(int target, int scope)
{
    CONTEXT_CALL();
    return !target && (scope == TO_OWNER || scope == TO_ALL) && flushes & 1 ? 0 : BAD_VALUE;
}

EMU_API cuda_error cuIpcGetMemHandle(ipc_handle *out, cuda_pointer base)
{
    CONTEXT_CALL();
    return memory_export(base, out);
}

EMU_API cuda_error cuIpcOpenMemHandle_v2(cuda_pointer *out, ipc_handle handle, unsigned flags)
{
    CONTEXT_CALL();
    return flags == 1 ? memory_open(&handle, current_device(), out) : BAD_VALUE;
}

EMU_API cuda_error cuIpcCloseMemHandle(cuda_pointer at)
{
    CONTEXT_CALL();
    return memory_close(at);
}

/* --- copies ------------------------------------------------------------------------------------------------------- */

typedef struct {
    cuda_pointer dst, src;
    uint64_t bytes;
} copy;

typedef struct {
    size_t count;
    cuda_pointer list; /* a kernel's; else there are copies */
    copy copies[];
} job;

/* In any order but that of the call, so that nobody comes to rely on it. */
static cuda_error run(void *work)
{
    job *self = work;
    cuda_error error = 0;
    bool fails = emu_fault("stream", &error);
    for (size_t i = self->count; !fails && !error && i-- > 0;) {
        copy each = self->list ? (copy){0, 0, 0} : self->copies[i];
        if (self->list && !memory_read(&each, self->list + i * sizeof each, sizeof each))
            error = BAD_ADDRESS;
        else if (each.bytes && !memory_copy(each.dst, each.src, each.bytes))
            error = BAD_ADDRESS;
    }
    free(self);
    return error;
}

static cuda_error push(job *made, void *stream)
{
    cuda_error error = made ? stream_push(stream, run, made) : NO_MEMORY;
    if (error)
        free(made);
    return error;
}

static job *job_of(size_t copies)
{
    job *made = calloc(1, sizeof *made + copies * sizeof *made->copies);
    if (made)
        made->count = copies;
    return made;
}

EMU_API cuda_error cuMemcpyAsync(cuda_pointer dst, cuda_pointer src, size_t bytes, void *stream)
{
    CONTEXT_CALL();
    if (!bytes || !memory_known(dst, bytes) || !memory_known(src, bytes))
        return BAD_VALUE;
    job *made = job_of(1);
    if (made)
        made->copies[0] = (copy){dst, src, bytes};
    return push(made, stream);
}

typedef struct {
    int order, places[4];
    unsigned flags;
} batch;

EMU_API cuda_error cuMemcpyBatchAsync(cuda_pointer *dsts, cuda_pointer *srcs, size_t *sizes, size_t number, batch *kinds,
                                      size_t *firsts, size_t num_kinds, size_t *failed, void *stream)
{
    CONTEXT_CALL();
    if (!number || num_kinds != 1 || firsts[0] || kinds->order < 1 || kinds->order > 3 || kinds->flags || !stream)
        return BAD_VALUE;
    job *made = job_of(number);
    for (size_t i = 0; made && i < number; i++) {
        if (!sizes[i] || !memory_known(dsts[i], sizes[i]) || !memory_known(srcs[i], sizes[i])) {
            *failed = i;
            free(made);
            return BAD_VALUE;
        }
        made->copies[i] = (copy){dsts[i], srcs[i], sizes[i]};
    }
    return push(made, stream);
}

/* --- the kernel --------------------------------------------------------------------------------------------------- */

static const char KERNEL[] = "pd_gather";

EMU_API cuda_error cuModuleLoadData(void **out, const void *image)
{
    CONTEXT_CALL();
    if (!strstr(image, ".entry pd_gather("))
        return BAD_KERNEL;
    count(MODULES, 1);
    *out = (void *)(uintptr_t)KERNEL;
    return 0;
}

EMU_API cuda_error cuModuleGetFunction(void **out, void *module, const char *name)
{
    CONTEXT_CALL();
    *out = module;
    return module == KERNEL && !strcmp(name, KERNEL) ? 0 : NOT_FOUND;
}

EMU_API cuda_error cuModuleUnload(void *module)
{
    CONTEXT_CALL();
    if (module != KERNEL)
        return BAD_VALUE;
    count(MODULES, -1);
    return 0;
}

EMU_API cuda_error cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                  unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **parameters,
                                  void **extra)
{
    CONTEXT_CALL();
    if (function != KERNEL || !grid_x || grid_y != 1 || grid_z != 1 || !block_x || block_x % 32 || block_x > 1024 ||
        block_y != 1 || block_z != 1 || shared_bytes || extra)
        return BAD_VALUE;
    job *made = job_of(0);
    if (made) {
        memcpy(&made->list, parameters[0], sizeof made->list);
        memcpy(&made->count, parameters[1], sizeof made->count);
    }
    return push(made, stream);
}
