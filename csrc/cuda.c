/* See cuda.h. */

#include "cuda.h"

#include "dl.h"

#include <errno.h>
#include <pthread.h>

cuda_library cuda;

#define SYMBOL(name) {#name, offsetof(cuda_library, name), false}
#define NEWER(name) {#name, offsetof(cuda_library, name), true}

static const pd_symbol symbols[] = {
    SYMBOL(cuInit), SYMBOL(cuDeviceGetCount), SYMBOL(cuDeviceGet), SYMBOL(cuDeviceGetUuid_v2),
    SYMBOL(cuDeviceCanAccessPeer), SYMBOL(cuDevicePrimaryCtxRetain), SYMBOL(cuDevicePrimaryCtxRelease_v2),
    SYMBOL(cuCtxGetCurrent), SYMBOL(cuCtxSetCurrent),
    SYMBOL(cuCtxGetDevice), SYMBOL(cuMemAlloc_v2), SYMBOL(cuMemFree_v2), SYMBOL(cuMemHostRegister_v2),
    SYMBOL(cuMemHostUnregister), SYMBOL(cuMemcpyAsync), NEWER(cuMemcpyBatchAsync), SYMBOL(cuStreamCreate),
    SYMBOL(cuStreamDestroy_v2), SYMBOL(cuStreamQuery),
    SYMBOL(cuPointerGetAttribute), SYMBOL(cuMemGetAddressRange_v2), SYMBOL(cuIpcGetMemHandle),
    SYMBOL(cuIpcOpenMemHandle_v2), SYMBOL(cuIpcCloseMemHandle), SYMBOL(cuModuleLoadData), SYMBOL(cuModuleGetFunction), SYMBOL(cuModuleUnload),
    SYMBOL(cuLaunchKernel), SYMBOL(cuGetErrorName),
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

static const char *remedy(cuda_error error)
{
    switch (error) {
    case CUDA_INVALID_VALUE: return "an address or size that the driver does not know";
    case 2: return "the GPU has no memory left: lower gpu_memory_utilization";
    case 3: return "this process was forked after CUDA began: start it with spawn";
    case 4: return "the driver is shutting down";
    case 46: return "the GPU is busy or in exclusive mode: see nvidia-smi -c";
    case 100: return "no GPU is visible: see CUDA_VISIBLE_DEVICES and nvidia-smi";
    case 101: return "there is no such GPU";
    case CUDA_INVALID_CONTEXT: return "no context of the GPU is current, or the memory is this process's own";
    case 205: return "the memory cannot be mapped: a container needs --ipc=host and --pid=host";
    case 208: return "the memory is mapped already";
    case 214: return "the GPU's memory is damaged: see nvidia-smi -q -d ECC and reset it";
    case 217: return "the two GPUs cannot reach each other: see nvidia-smi topo -p2p r";
    case 218: case 222: return "the driver does not take our kernel: update it";
    case 400: return "the owner's memory is gone";
    case 700: case 719: return "a kernel failed: this process's GPU context is lost, restart it";
    case 711: return "too many GPUs are reached at once";
    case 712: return "the memory is registered already";
    case 713: return "the memory is not registered";
    case 801: return "this GPU or driver cannot do that";
    case 802: return "the system is not ready: is the fabric manager running?";
    case 803: return "driver and library differ: reboot, or reload the kernel's module";
    default: return "see CUresult in the documentation of the CUDA driver";
    }
}

int cuda_failed(const char *what, cuda_error error)
{
    const char *name = NULL;
    if (cuda.cuGetErrorName(error, &name) || !name)
        name = "CUDA";
    return pd_fail(EIO, "%s: %.40s error %d (%s)", what, name, error, remedy(error));
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
