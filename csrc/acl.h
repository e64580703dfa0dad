/* AscendCL, the runtime of Huawei's NPUs, as far as we use it: our own declarations of its public C interface (CANN 8.2 to
 * 9.1), opened when it is first needed. Never run on an NPU by us: proven against an emulation (tests/ascend_emulated). */
#ifndef PD_ACL_H
#define PD_ACL_H

#include "backend.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int acl_error; /* 0: fine */

enum {
    ACL_BAD_ARGUMENT = 107000,
    ACL_NO_CONTEXT = 107002,
    ACL_SYNC_TIMEOUT = 107020,
    ACL_NOT_SUPPORTED = 207000,
};
enum { ACL_HOST_TO_DEVICE = 1, ACL_DEVICE_TO_HOST, ACL_DEVICE_TO_DEVICE };
enum { ACL_LOCATION_HOST, ACL_LOCATION_DEVICE };
enum { ACL_HUGE_FIRST = 0, ACL_HOST_MAPPED = 0, ACL_LAST_MS = 10000 };

typedef struct {
    uint32_t id;
    int type;
} acl_location;

typedef struct {
    acl_location location;
    uint32_t page_bytes, reserved[4];
} acl_pointer;

typedef struct {
    acl_location dst, src;
    uint8_t reserved[16];
} acl_batch;

_Static_assert(sizeof(acl_location) == 8 && sizeof(acl_pointer) == 28 && sizeof(acl_batch) == 32, "as AscendCL has them");

typedef struct {
    acl_error (*aclrtSetDevice)(int32_t device);
    acl_error (*aclrtGetDevice)(int32_t *device);
    acl_error (*aclrtGetCurrentContext)(void **context);
    acl_error (*aclrtSetCurrentContext)(void *context);
    acl_error (*aclrtMalloc)(void **at, size_t bytes, int policy);
    acl_error (*aclrtFree)(void *at);
    acl_error (*aclrtHostRegister)(void *at, uint64_t bytes, int type, void **on_device);
    acl_error (*aclrtHostUnregister)(void *at);
    acl_error (*aclrtMemcpyAsync)(void *dst, size_t room, const void *src, size_t bytes, int kind, void *stream);
    acl_error (*aclrtMemcpy2dAsync)(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width, size_t height,
                                    int kind, void *stream); /* optional */
    acl_error (*aclrtMemcpyBatchAsync)(void **dsts, size_t *rooms, void **srcs, size_t *sizes, size_t count, acl_batch *kinds,
                                       size_t *first_of_kind, size_t num_kinds, size_t *failed, void *stream); /* optional */
    acl_error (*aclrtCreateStream)(void **stream);
    acl_error (*aclrtDestroyStream)(void *stream);
    acl_error (*aclrtSynchronizeStreamWithTimeout)(void *stream, int32_t milliseconds);
    acl_error (*aclrtPointerGetAttributes)(const void *at, acl_pointer *out);
    const char *(*aclGetRecentErrMsg)(void); /* optional */
} acl_library;

extern acl_library acl;

int acl_load(void); /* 0, or a negative errno after pd_fail */
/* -EIO after pd_fail, with what AscendCL says and what can be done. */
int acl_failed(const char *what, acl_error error);
/* The device that memory lies on; -1: it is the host's. */
int acl_device_of(const void *at);
/* The same of a region. -2 after pd_fail: it is of a device, but of which one cannot be told. */
int acl_device_of_region(const pd_region *region);
/* The one that all regions of devices lie on; -1: there are none. Negative after pd_fail: on several, or it cannot be told,
 * or it is not `before` (-1: whichever), which an agent cannot change. */
int acl_device_of_all(const pd_memory *memory, int before, int *out);
/* The context of a device, made the calling thread's; NULL after pd_fail. */
void *acl_context(int device);
/* The calling thread works in this context from now on. 0, or negative after pd_fail. */
int acl_enter(void *context);

/* Until a stream has nothing left, and what it said: on return nothing of it writes any more. One that gives no clean answer
 * is destroyed, which waits for what it holds, and NULL then. While neither can be had we stay, for what it writes to must
 * not be used again. ACL_SYNC_TIMEOUT: `core` (NULL: none) has been closing for ACL_LAST_MS, and it may still write. */
acl_error acl_drain(void **stream, pd_transport *core);

/* Whether rows that are a stride apart can be copied at once: some drivers have the function, but not for all kinds. Once it
 * failed they are copied one by one, which tells what is really wrong, if anything is. */
bool acl_rows_work(void);
void acl_rows_fail(void);

/* Where reads of short runs go to on the device, before the runs are put in their places there: one buffer for each of the
 * core's threads, which is as many as are inside of slices at once. */
typedef struct {
    void *context, *stream;
    pd_transport *core;
    pthread_mutex_t lock; /* guards the stream */
    unsigned char *buffers;
    size_t count, lent; /* of PD_MAX_SLICE_BYTES each */
    bool stuck; /* the device may still use it */
} acl_scratch;

int acl_scratch_open(acl_scratch *out, pd_transport *core, void *context, int count); /* negative after pd_fail */
void acl_scratch_close(acl_scratch *each);                        /* also of one that is all zero */
unsigned char *acl_scratch_lend(acl_scratch *each);               /* NULL after pd_fail */
pd_status acl_scratch_place(acl_scratch *each, const pd_rows *rows, size_t count);

#endif
