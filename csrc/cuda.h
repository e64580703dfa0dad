/* The driver of NVIDIA's GPUs, as far as we use it: our own declarations of its public C interface, opened when it
 * is first needed; nothing of the runtime library is needed beside it. Never run on a GPU by us: proven against an
 * emulation (tests/cuda_emulated). */
#ifndef PD_CUDA_H
#define PD_CUDA_H

#include "backend.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int cuda_error;       /* 0: fine */
typedef uint64_t cuda_pointer; /* memory of a device, or of the host where it is registered */

enum {
    CUDA_INVALID_VALUE = 1,
    CUDA_INVALID_CONTEXT = 201,
    CUDA_NOT_READY = 600,
};
enum { CUDA_POINTER_MEMORY_TYPE = 2, CUDA_POINTER_DEVICE_POINTER = 3, CUDA_POINTER_DEVICE = 9 };
enum { CUDA_MEMORY_DEVICE = 2 };
enum { CUDA_HOST_PORTABLE = 1, CUDA_HOST_MAPPED = 2 };
enum { CUDA_STREAM_NON_BLOCKING = 1 };
enum { CUDA_IPC_BYTES = 64, CUDA_IPC_LAZY_PEER_ACCESS = 1, CUDA_UUID_BYTES = 16 };
enum { CUDA_ORDER_OF_STREAM = 1 };
enum { CUDA_DEVICE_FLUSH_OPTIONS = 117, CUDA_DEVICE_WRITES_ORDERING = 118 };
enum { CUDA_FLUSH_BY_HOST = 1, CUDA_ORDERED_FOR_OWNER = 100 }; /* values of these */
enum { CUDA_FLUSH_CURRENT_CONTEXT = 0, CUDA_FLUSH_TO_OWNER = 100 };
enum { CUDA_HANDLE_DMA_BUF = 1 };

typedef struct {
    unsigned char bytes[CUDA_IPC_BYTES];
} cuda_ipc_handle;

typedef struct {
    unsigned char bytes[CUDA_UUID_BYTES];
} cuda_uuid;

typedef struct {
    int type, id;
} cuda_location;

typedef struct { /* how the copies of a batch see their sources */
    int order;
    cuda_location src, dst;
    unsigned flags;
} cuda_batch;

_Static_assert(sizeof(cuda_ipc_handle) == 64 && sizeof(cuda_batch) == 24, "as the driver has them");

/* Names with a _v2 are those that the driver exports, whatever a header would make of the shorter ones. Of
 * cuMemcpyBatchAsync the plain name stays the form of CUDA 12.8, also in the drivers of CUDA 13, whose headers mean
 * another one by it. */
typedef struct {
    cuda_error (*cuInit)(unsigned flags);
    cuda_error (*cuDeviceGetCount)(int *count);
    cuda_error (*cuDeviceGet)(int *device, int ordinal);
    cuda_error (*cuDeviceGetAttribute)(int *out, int attribute, int device);
    cuda_error (*cuDeviceGetPCIBusId)(char *out, int room, int device);
    cuda_error (*cuDeviceGetUuid_v2)(cuda_uuid *out, int device);
    cuda_error (*cuDeviceCanAccessPeer)(int *can, int device, int peer);
    cuda_error (*cuDevicePrimaryCtxRetain)(void **context, int device);
    cuda_error (*cuDevicePrimaryCtxRelease_v2)(int device);
    cuda_error (*cuCtxGetCurrent)(void **context);
    cuda_error (*cuCtxSetCurrent)(void *context);
    cuda_error (*cuCtxGetDevice)(int *device);
    cuda_error (*cuMemAlloc_v2)(cuda_pointer *at, size_t bytes);
    cuda_error (*cuMemFree_v2)(cuda_pointer at);
    cuda_error (*cuMemHostRegister_v2)(void *at, size_t bytes, unsigned flags);
    cuda_error (*cuMemHostUnregister)(void *at);
    cuda_error (*cuMemcpyAsync)(cuda_pointer dst, cuda_pointer src, size_t bytes, void *stream);
    cuda_error (*cuMemcpyBatchAsync)(cuda_pointer *dsts, cuda_pointer *srcs, size_t *sizes, size_t count,
                                     cuda_batch *kinds, size_t *first_of_kind, size_t num_kinds, size_t *failed,
                                     void *stream); /* optional */
    cuda_error (*cuStreamCreate)(void **stream, unsigned flags);
    cuda_error (*cuStreamDestroy_v2)(void *stream);
    cuda_error (*cuStreamQuery)(void *stream);
    cuda_error (*cuPointerGetAttribute)(void *out, int attribute, cuda_pointer at);
    cuda_error (*cuMemGetAddressRange_v2)(cuda_pointer *base, size_t *bytes, cuda_pointer at);
    cuda_error (*cuMemGetHandleForAddressRange)(void *out, cuda_pointer at, size_t bytes, int kind,
                                                unsigned long long flags); /* optional */
    cuda_error (*cuFlushGPUDirectRDMAWrites)(int target, int scope);       /* optional */
    cuda_error (*cuIpcGetMemHandle)(cuda_ipc_handle *out, cuda_pointer base);
    cuda_error (*cuIpcOpenMemHandle_v2)(cuda_pointer *out, cuda_ipc_handle handle, unsigned flags);
    cuda_error (*cuIpcCloseMemHandle)(cuda_pointer at);
    cuda_error (*cuModuleLoadData)(void **module, const void *image);
    cuda_error (*cuModuleGetFunction)(void **function, void *module, const char *name);
    cuda_error (*cuModuleUnload)(void *module);
    cuda_error (*cuLaunchKernel)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                 unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream,
                                 void **parameters, void **extra);
    cuda_error (*cuGetErrorName)(cuda_error error, const char **out);
} cuda_library;

extern cuda_library cuda;

int cuda_load(void);  /* 0, or a negative errno after pd_fail: there is a driver */
int cuda_probe(void); /* the same: there is a GPU too, and it can be used */
/* -EIO after pd_fail, with what the driver says and what can be done. */
int cuda_failed(const char *what, cuda_error error);
/* The device that memory lies on; -1: it is the host's, or nobody's. */
int cuda_device_of(cuda_pointer at);
/* The one that all regions of devices lie on; -1: there are none. Negative after pd_fail: on several, or on none, or it is
 * not `before` (-1: whichever), which an agent cannot change, or GPUs cannot be used here. */
int cuda_device_of_all(const pd_memory *memory, int before, int *out);

typedef struct { /* of a device: its primary one, which is the one that engines use too */
    void *handle;
    int device;
} cuda_context;

int cuda_context_open(cuda_context *out, int ordinal); /* negative after pd_fail */
void cuda_context_close(cuda_context *each);           /* also of one that is all zero */
/* The calling thread works in this context until cuda_leave, which gives it its own one back: it may be an engine's.
 * Negative after pd_fail, and nothing to leave. */
int cuda_enter(const cuda_context *each, void **before);
void cuda_leave(void *before);
/* Let the GPU read and write host memory; `reachable`: its kernels find it at the same address. Negative after pd_fail. */
int cuda_pin(const cuda_context *each, void *at, size_t bytes, bool *reachable);
void cuda_unpin(const cuda_context *each, void *at);

#endif
