/* See cuda.h. */

#include "cuda.h"

#include "dl.h"

#include <errno.h>
#include <pthread.h>

cuda_library cuda;

#define SYMBOL(name) {#name, offsetof(cuda_library, name), false}
#define NEWER(name) {#name, offsetof(cuda_library, name), true}

static const pd_symbol symbols[] = {
    SYMBOL(cuInit), SYMBOL(cuDeviceGetCount), SYMBOL(cuDeviceGet), SYMBOL(cuDeviceGetAttribute),
    SYMBOL(cuDeviceGetPCIBusId), SYMBOL(cuDeviceGetUuid_v2),
    SYMBOL(cuDeviceCanAccessPeer), SYMBOL(cuDevicePrimaryCtxRetain), SYMBOL(cuDevicePrimaryCtxRelease_v2),
    SYMBOL(cuCtxGetCurrent), SYMBOL(cuCtxSetCurrent),
    SYMBOL(cuCtxGetDevice), SYMBOL(cuMemAlloc_v2), SYMBOL(cuMemFree_v2), SYMBOL(cuMemHostRegister_v2),
    SYMBOL(cuMemHostUnregister), SYMBOL(cuMemcpyAsync), NEWER(cuMemcpyBatchAsync), SYMBOL(cuStreamCreate),
    SYMBOL(cuStreamDestroy_v2), SYMBOL(cuStreamQuery),
    SYMBOL(cuPointerGetAttribute), SYMBOL(cuMemGetAddressRange_v2),
    NEWER(cuMemGetHandleForAddressRange), NEWER(cuFlushGPUDirectRDMAWrites), SYMBOL(cuIpcGetMemHandle),
    SYMBOL(cuIpcOpenMemHandle_v2), SYMBOL(cuIpcCloseMemHandle), SYMBOL(cuModuleLoadData),
    SYMBOL(cuModuleGetFunction), SYMBOL(cuModuleUnload), SYMBOL(cuLaunchKernel), SYMBOL(cuGetErrorName),
};

int cuda_load(void)
{
    static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&opening);
    int error = 0;
    if (!cuda.cuInit) {
        cuda_library found;
        error = pd_dl_open("libcuda.so.1", symbols, sizeof symbols / sizeof *symbols, &found);
        if (!error)
            cuda = found;
    }
    pthread_mutex_unlock(&opening);
    return error;
}

int cuda_probe(void)
{
    int count = 0, error = cuda_load();
    if (error)
        return error;
    cuda_error found = cuda.cuInit(0); /* again and again is allowed */
    if (!found)
        found = cuda.cuDeviceGetCount(&count);
    if (found)
        return cuda_failed("no GPU can be used", found);
    return count ? 0 : pd_fail(ENODEV, "there is no GPU (CUDA_VISIBLE_DEVICES may hide it)");
}

/* Short: what a completion has room for is little more. NULL: the driver's own name for it must do. */
static const char *remedy(cuda_error error)
{
    switch (error) {
    case CUDA_INVALID_VALUE: return "an address or size that the driver does not know";
    case 2: return "no GPU memory left: lower gpu_memory_utilization";
    case 3: return "forked after CUDA began: start processes with spawn";
    case 46: return "the GPU is busy or exclusive: nvidia-smi -c";
    case 100: return "no GPU is visible: see CUDA_VISIBLE_DEVICES";
    case 101: return "there is no such GPU";
    case CUDA_INVALID_CONTEXT: return "not in this process or thread";
    case 205: return "it cannot be mapped: containers need --ipc=host";
    case 214: return "memory is damaged: nvidia-smi -q -d ECC";
    case 217: return "the GPUs are apart: nvidia-smi topo -p2p r";
    case 400: return "the owner's memory is gone";
    case 220: case 226: case 700: case 719: case 809: case 911: return "its context is lost: restart this process";
    case 712: return "it is registered already";
    case 713: return "it is not registered";
    case 801: return "this GPU or driver cannot do that";
    case 802: return "not ready: is the fabric manager running?";
    case 803: return "driver and library differ: reboot";
    default: return NULL;
    }
}

int cuda_failed(const char *what, cuda_error error)
{
    const char *words = remedy(error);
    if (!words && (cuda.cuGetErrorName(error, &words) || !words))
        words = "see CUresult in the driver's documentation";
    return pd_fail(EIO, "%s: CUDA error %d, %.60s", what, error, words);
}

int cuda_device_of(cuda_pointer at)
{
    unsigned type = 0;
    int device = -1;
    if (cuda.cuPointerGetAttribute(&type, CUDA_POINTER_MEMORY_TYPE, at) || type != CUDA_MEMORY_DEVICE ||
        cuda.cuPointerGetAttribute(&device, CUDA_POINTER_DEVICE, at))
        return -1;
    return device;
}

int cuda_device_of_all(const pd_memory *memory, int before, int *out)
{
    *out = -1;
    for (size_t i = 0; i < memory->num_regions; i++) {
        const pd_region *region = &memory->regions[i];
        if (!(region->flags & PD_OF_DEVICE))
            continue;
        if (*out < 0 && cuda_probe())
            return -ENODEV;
        int here = cuda_device_of(region->address);
        if (here < 0)
            return pd_fail(EINVAL, "memory at %#llx is not of a GPU", (unsigned long long)region->address);
        if (*out >= 0 && here != *out)
            return pd_fail(EINVAL, "memory lies on GPU %d and on GPU %d: use an agent for each", *out, here);
        *out = here;
    }
    if (before >= 0 && *out >= 0 && *out != before)
        return pd_fail(EINVAL, "memory on GPU %d: this agent's was on GPU %d", *out, before);
    return 0;
}

int cuda_context_open(cuda_context *out, int ordinal)
{
    cuda_context made = {NULL, 0};
    cuda_error error = cuda.cuDeviceGet(&made.device, ordinal);
    if (!error)
        error = cuda.cuDevicePrimaryCtxRetain(&made.handle, made.device);
    if (error)
        return cuda_failed("the GPU cannot be used", error);
    *out = made;
    return 0;
}

void cuda_context_close(cuda_context *each)
{
    if (each->handle)
        cuda.cuDevicePrimaryCtxRelease_v2(each->device);
    *each = (cuda_context){NULL, 0};
}

int cuda_enter(const cuda_context *each, void **before)
{
    void *current = NULL;
    cuda_error error = cuda.cuCtxGetCurrent(&current);
    if (!error && current != each->handle)
        error = cuda.cuCtxSetCurrent(each->handle);
    if (error)
        return cuda_failed("the GPU cannot be used by this thread", error);
    *before = current;
    return 0;
}

void cuda_leave(void *before)
{
    void *current = NULL;
    if (!cuda.cuCtxGetCurrent(&current) && current != before)
        cuda.cuCtxSetCurrent(before);
}

int cuda_pin(const cuda_context *each, void *at, size_t bytes, bool *reachable)
{
    cuda_pointer there = 0, here = (uintptr_t)at;
    void *before = NULL;
    if (cuda_enter(each, &before))
        return -EIO;
    cuda_error error = cuda.cuMemHostRegister_v2(at, bytes, CUDA_HOST_PORTABLE | CUDA_HOST_MAPPED);
    *reachable = !error && !cuda.cuPointerGetAttribute(&there, CUDA_POINTER_DEVICE_POINTER, here) && there == here;
    cuda_leave(before);
    return error ? cuda_failed("host memory cannot be pinned", error) : 0;
}

void cuda_unpin(const cuda_context *each, void *at)
{
    void *before = NULL;
    if (cuda_enter(each, &before))
        return;
    cuda.cuMemHostUnregister(at);
    cuda_leave(before);
}
