/* What the parts of the emulated libcuda.so.1 share. Faults and counters are tests/ascend_emulated/emu.c's. */
#ifndef PD_CUDA_EMU_H
#define PD_CUDA_EMU_H

#include "../ascend_emulated/emu.h"

typedef int cuda_error;
typedef uint64_t cuda_pointer;

enum {
    BAD_VALUE = 1,
    NO_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_SUCH_DEVICE = 101,
    NO_CONTEXT = 201,
    NO_PEER = 217,
    BAD_KERNEL = 218,
    BAD_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    BAD_ADDRESS = 700,
    REGISTERED_ALREADY = 712,
    NOT_REGISTERED = 713,
};

/* What is made and not given back yet; tests read it. */
typedef enum { ALLOCATIONS, OPENED, PINNED, STREAMS, MODULES, CONTEXTS, KINDS_OF_THINGS } thing;
void count(thing what, int by);

typedef struct {
    unsigned char bytes[64];
} ipc_handle;

/* Memory of a device, which the processor must not touch where the device has it; the emulation does by a second mapping
 * of the same memfd. Only what was pinned is reached of the host's. */
cuda_error memory_make(int device, size_t bytes, cuda_pointer *out);
cuda_error memory_free(cuda_pointer at);
cuda_error memory_pin(void *at, size_t bytes);
cuda_error memory_unpin(void *at);
cuda_error memory_export(cuda_pointer base, ipc_handle *out);
cuda_error memory_open(const ipc_handle *handle, int device, cuda_pointer *out);
cuda_error memory_close(cuda_pointer at);
/* A descriptor that stands for the pages from `at` on; its file offset says where in the memfd they start. */
cuda_error memory_dma_buf(cuda_pointer at, size_t bytes, int *out);
bool memory_range(cuda_pointer at, cuda_pointer *base, size_t *bytes);
int memory_device(cuda_pointer at); /* -1: pinned memory of the host; -2: unknown */
bool memory_known(cuda_pointer at, size_t bytes);
bool memory_copy(cuda_pointer dst, cuda_pointer src, size_t bytes); /* false: an end of it is not there any more */
bool memory_read(void *out, cuda_pointer src, size_t bytes);
bool can_access(int device, int peer);

/* A task for a stream's worker, run in order; its result, if not 0, is the stream's error from then on. `run` frees
 * `work`, which stays the caller's where the push fails. */
cuda_error stream_push(void *stream, cuda_error (*run)(void *work), void *work);

int current_device(void); /* -1: the thread has no context */
bool usable(void);        /* after cuInit, and not in a fork */

/* How every call begins that needs no context, and one that does. */
#define CALL()                                                                                                         \
    do {                                                                                                               \
        EMU_FAULT(__func__);                                                                                           \
        if (!usable())                                                                                                 \
            return NOT_INITIALIZED;                                                                                    \
    } while (0)
#define CONTEXT_CALL()                                                                                                 \
    do {                                                                                                               \
        CALL();                                                                                                        \
        if (current_device() < 0)                                                                                      \
            return NO_CONTEXT;                                                                                         \
    } while (0)

#endif
