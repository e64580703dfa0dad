/* libascendcl.so: contexts, memory and copies with the codes and the order rules that are documented. */

#include "emu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MAX_DEVICES 64
#define DEVICE_BYTES ((size_t)64 << 30)

enum { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, BY_ADDRESS };
enum { AT_HOST, AT_DEVICE, AT_UNREGISTERED };

typedef struct {
    uint32_t id;
    int type;
} aclrtMemLocation;

typedef struct {
    aclrtMemLocation location;
    uint32_t pageSize;
    uint32_t rsv[4];
} aclrtPtrAttributes;

typedef struct {
    aclrtMemLocation dstLoc, srcLoc;
    uint8_t rsv[16];
} aclrtMemcpyBatchAttr;

typedef struct {
    int users; /* SetDevice minus ResetDevice; the context is gone at 0 */
} context;

typedef struct {
    size_t count;
    struct {
        emu_end to, from;
        size_t bytes;
    } copies[];
} batch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static context contexts[MAX_DEVICES];
static bool initialized;
static _Thread_local context *current;

void emu_context_forked(void)
{
    pthread_mutex_init(&lock, NULL);
    memset(contexts, 0, sizeof contexts);
    initialized = false;
    current = NULL;
}

/* The boards this process sees, in its own numbering: `boards[i]` is device i. */
static int visible(int boards[MAX_DEVICES])
{
    const char *all = getenv("ASCEND_EMU_DEVICES"), *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
    int exist = all ? atoi(all) : 2, count = 0;
    if (exist > MAX_DEVICES)
        exist = MAX_DEVICES;
    if (!list) {
        for (; count < exist; count++)
            boards[count] = count;
        return count;
    }
    /* The list ends at its first entry that is no board. */
    while (*list && count < exist) {
        char *end;
        long board = strtol(list, &end, 10);
        if (end == list || board < 0 || board >= exist)
            break;
        boards[count++] = (int)board;
        list = *end == ',' ? end + 1 : "";
    }
    return count;
}

int emu_physical(int device)
{
    int boards[MAX_DEVICES];
    return device >= 0 && device < visible(boards) ? boards[device] : -1;
}

int emu_current_device(void)
{
    if (!current)
        return -1;
    pthread_mutex_lock(&lock);
    int device = current->users ? (int)(current - contexts) : -1;
    pthread_mutex_unlock(&lock);
    return device;
}

EMU_API int aclInit(const char *config)
{
    EMU_FAULT(__func__);
    (void)config;
    pthread_mutex_lock(&lock);
    bool again = initialized;
    initialized = true;
    pthread_mutex_unlock(&lock);
    return again ? emu_fail(ACL_REPEATED_INIT, "aclInit was called before") : 0;
}

EMU_API const char *aclGetRecentErrMsg(void)
{
    return emu_failure();
}

EMU_API int aclrtGetDeviceCount(uint32_t *count)
{
    EMU_FAULT(__func__);
    int boards[MAX_DEVICES];
    if (!count)
        return emu_fail(ACL_INVALID_PARAM, "no place for the count");
    *count = (uint32_t)visible(boards);
    return 0;
}

EMU_API int aclrtSetDevice(int32_t device)
{
    EMU_FAULT(__func__);
    if (emu_physical(device) < 0)
        return emu_fail(ACL_RT_PARAM, "no such device");
    pthread_mutex_lock(&lock);
    contexts[device].users++;
    current = &contexts[device];
    pthread_mutex_unlock(&lock);
    return 0;
}

EMU_API int aclrtGetDevice(int32_t *device)
{
    EMU_DEVICE_CALL();
    if (!device)
        return emu_fail(ACL_INVALID_PARAM, "no place for the device");
    *device = emu_current_device();
    return 0;
}

/* The last reset takes the device's memory with it, under whoever still uses it. */
EMU_API int aclrtResetDevice(int32_t device)
{
    EMU_FAULT(__func__);
    if (emu_physical(device) < 0)
        return emu_fail(ACL_RT_PARAM, "no such device");
    pthread_mutex_lock(&lock);
    bool last = contexts[device].users == 1;
    if (contexts[device].users)
        contexts[device].users--;
    pthread_mutex_unlock(&lock);
    if (last) {
        emu_stream_drain(device);
        emu_memory_reset(device);
    }
    return 0;
}

EMU_API int aclrtGetCurrentContext(void **handle)
{
    EMU_DEVICE_CALL();
    if (!handle)
        return emu_fail(ACL_INVALID_PARAM, "no place for the context");
    *handle = current;
    return 0;
}

EMU_API int aclrtSetCurrentContext(void *handle)
{
    EMU_FAULT(__func__);
    uintptr_t offset = (uintptr_t)handle - (uintptr_t)contexts;
    if (offset >= sizeof contexts || offset % sizeof *contexts)
        return emu_fail(ACL_RT_PARAM, "not a context");
    pthread_mutex_lock(&lock);
    bool alive = ((context *)handle)->users > 0;
    if (alive)
        current = handle;
    pthread_mutex_unlock(&lock);
    return alive ? 0 : emu_fail(ACL_RT_PARAM, "the context's device was reset");
}

EMU_API int aclrtMalloc(void **pointer, size_t bytes, int policy)
{
    EMU_DEVICE_CALL();
    int device = emu_current_device();
    (void)policy;
    if (!pointer || !bytes)
        return emu_fail(ACL_INVALID_PARAM, "no bytes, or no place for the pointer");
    *pointer = NULL;
    if (bytes <= DEVICE_BYTES && emu_memory_used(device) <= DEVICE_BYTES - bytes)
        *pointer = emu_memory_allocate(device, bytes);
    return *pointer ? 0 : emu_fail(ACL_RT_NO_MEMORY, "the device has no memory left");
}

EMU_API int aclrtFree(void *pointer)
{
    EMU_DEVICE_CALL();
    if (!pointer)
        return emu_fail(ACL_INVALID_PARAM, "no pointer");
    return emu_memory_free(pointer, EMU_DEVICE) ? emu_fail(ACL_RT_PARAM, "not an allocation of aclrtMalloc") : 0;
}

EMU_API int aclrtMallocHost(void **pointer, size_t bytes)
{
    EMU_DEVICE_CALL();
    if (!pointer || !bytes)
        return emu_fail(ACL_INVALID_PARAM, "no bytes, or no place for the pointer");
    *pointer = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*pointer != MAP_FAILED && !emu_memory_pin(*pointer, bytes, emu_current_device(), true))
        return 0;
    *pointer = NULL;
    return emu_fail(ACL_RT_NO_MEMORY, "the host has no memory left");
}

EMU_API int aclrtFreeHost(void *pointer)
{
    EMU_DEVICE_CALL();
    if (!pointer)
        return emu_fail(ACL_INVALID_PARAM, "no pointer");
    return emu_memory_free(pointer, EMU_PINNED) ? emu_fail(ACL_RT_PARAM, "not an allocation of aclrtMallocHost") : 0;
}

EMU_API int aclrtHostRegister(void *pointer, uint64_t bytes, int type, void **view)
{
    EMU_DEVICE_CALL();
    int device = emu_current_device();
    if (!pointer || !bytes || !view)
        return emu_fail(ACL_INVALID_PARAM, "no range, or no place for the device's pointer");
    if (type)
        return emu_fail(ACL_RT_NOT_SUPPORTED, "only mapped registration is supported");
    if (emu_memory_pin(pointer, bytes, device, false))
        return emu_fail(ACL_RT_PARAM, "the range overlaps one that is known");
    if ((*view = emu_memory_map(pointer, bytes, device)))
        return 0;
    emu_memory_unpin(pointer);
    return emu_fail(ACL_RT_INTERNAL, "the range cannot be mapped");
}

EMU_API int aclrtHostUnregister(void *pointer)
{
    EMU_DEVICE_CALL();
    if (!pointer)
        return emu_fail(ACL_INVALID_PARAM, "no pointer");
    return emu_memory_unpin(pointer) ? emu_fail(ACL_RT_PARAM, "not a registered range") : 0;
}

EMU_API int aclrtPointerGetAttributes(const void *pointer, aclrtPtrAttributes *into)
{
    EMU_DEVICE_CALL();
    if (!pointer || !into)
        return emu_fail(ACL_INVALID_PARAM, "no pointer, or no place for its attributes");
    emu_kind kind = emu_kind_of(pointer, 1);
    int device = emu_device_of(pointer);
    *into = (aclrtPtrAttributes){.location = {device < 0 ? 0 : (uint32_t)device, AT_UNREGISTERED}, .pageSize = 4096};
    if (kind == EMU_DEVICE)
        into->location.type = AT_DEVICE, into->pageSize = 2 << 20;
    else if (kind == EMU_PINNED)
        into->location.type = AT_HOST;
    return 0;
}

/* What is wrong with one end of a copy, NULL for nothing. */
static const char *wrong_end(const void *pointer, size_t bytes, bool is_device, bool pageable_is_allowed)
{
    emu_kind kind = emu_kind_of(pointer, bytes);
    if (kind == EMU_OUTSIDE)
        return "a copy leaves its allocation";
    if (is_device != (kind == EMU_DEVICE))
        return is_device ? "a device address is not of device memory" : "a host address is of device memory";
    return kind == EMU_PAGEABLE && !pageable_is_allowed ? "host memory is not pinned" : NULL;
}

static const char *wrong_copy(void *to, const void *from, size_t bytes, int kind, bool pageable_is_allowed)
{
    bool to_device = kind == HOST_TO_DEVICE || kind == DEVICE_TO_DEVICE;
    bool from_device = kind == DEVICE_TO_HOST || kind == DEVICE_TO_DEVICE;
    if (kind == BY_ADDRESS) {
        to_device = emu_kind_of(to, 1) == EMU_DEVICE;
        from_device = emu_kind_of(from, 1) == EMU_DEVICE;
    }
    const char *wrong = wrong_end(to, bytes, to_device, pageable_is_allowed);
    return wrong ? wrong : wrong_end(from, bytes, from_device, pageable_is_allowed);
}

static int check_copy(void *to, size_t room, const void *from, size_t bytes, int kind, bool pageable_is_allowed)
{
    if (!to || !from)
        return emu_fail(ACL_INVALID_PARAM, "a copy without both ends");
    if (kind < HOST_TO_HOST || kind > BY_ADDRESS)
        return emu_fail(ACL_INVALID_PARAM, "an unknown kind of copy");
    if (!bytes || bytes > room)
        return emu_fail(ACL_RT_PARAM, "a copy of nothing, or of more than its destination takes");
    const char *wrong = wrong_copy(to, from, bytes, kind, pageable_is_allowed);
    return wrong ? emu_fail(ACL_RT_PARAM, wrong) : 0;
}

static emu_end end_of(const void *pointer)
{
    return (emu_end){(void *)(uintptr_t)pointer, emu_kind_of(pointer, 1)};
}

EMU_API int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind)
{
    EMU_DEVICE_CALL();
    int status = check_copy(to, room, from, bytes, kind, true);
    if (status)
        return status;
    return emu_copy(end_of(to), end_of(from), bytes) ? 0 : emu_fail(ACL_RT_PARAM, "memory was freed under a copy");
}

/* What was checked at the call may have been freed by now: that is a failure of the device, not of an argument. */
static int run_batch(void *work)
{
    batch *self = work;
    int status = 0;
    bool fails = emu_fault("stream", &status);
    for (size_t i = 0; !fails && i < self->count && !status; i++)
        if (!emu_copy(self->copies[i].to, self->copies[i].from, self->copies[i].bytes))
            status = ACL_RT_INTERNAL;
    free(self);
    return status;
}

static batch *batch_new(size_t count)
{
    batch *made = malloc(sizeof *made + count * sizeof *made->copies);
    if (made)
        made->count = count;
    return made;
}

static void batch_set(batch *self, size_t index, void *to, const void *from, size_t bytes)
{
    self->copies[index].to = end_of(to);
    self->copies[index].from = end_of(from);
    self->copies[index].bytes = bytes;
}

static int push(batch *what, void *stream)
{
    int status = emu_stream_push(stream, run_batch, what);
    if (status)
        free(what);
    return status;
}

EMU_API int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream)
{
    EMU_DEVICE_CALL();
    int status = check_copy(to, room, from, bytes, kind, false);
    if (status)
        return status;
    batch *made = batch_new(1);
    if (!made)
        return emu_fail(ACL_RT_INTERNAL, "no memory for a task");
    batch_set(made, 0, to, from, bytes);
    return push(made, stream);
}

EMU_API int aclrtMemcpy2dAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                               int kind, void *stream)
{
    EMU_DEVICE_CALL();
    if (!width || !height || width > to_pitch || width > from_pitch)
        return emu_fail(ACL_RT_PARAM, "rows that overlap, or none");
    batch *made = batch_new(height);
    if (!made)
        return emu_fail(ACL_RT_INTERNAL, "no memory for a task");
    for (size_t row = 0; row < height; row++) {
        char *here = (char *)to + row * to_pitch;
        const char *there = (const char *)from + row * from_pitch;
        int status = check_copy(here, width, there, width, kind, false);
        if (status) {
            free(made);
            return status;
        }
        batch_set(made, row, here, there, width);
    }
    return push(made, stream);
}

/* The kind all copies of a batch share, or the negative code of what real boards answer. */
static int batch_kind(const aclrtMemcpyBatchAttr *attrs, const size_t *starts, size_t count, size_t copies)
{
    int kind = -1;
    for (size_t i = 0; i < count; i++) {
        bool to_device = attrs[i].dstLoc.type == AT_DEVICE && attrs[i].srcLoc.type == AT_HOST;
        bool to_host = attrs[i].dstLoc.type == AT_HOST && attrs[i].srcLoc.type == AT_DEVICE;
        int this_kind = to_device ? HOST_TO_DEVICE : DEVICE_TO_HOST;
        uint32_t device = to_device ? attrs[i].dstLoc.id : attrs[i].srcLoc.id;
        if ((!to_device && !to_host) || (kind >= 0 && kind != this_kind))
            return -emu_fail(ACL_RT_NOT_SUPPORTED, "a batch copies either to the device or to the host");
        if (device != (uint32_t)emu_current_device())
            return -emu_fail(ACL_RT_PARAM, "a batch names another device");
        if (starts[i] >= copies || (i ? starts[i] <= starts[i - 1] : starts[i] != 0))
            return -emu_fail(ACL_RT_PARAM, "the attributes of a batch do not begin at 0 and rise");
        kind = this_kind;
    }
    return kind;
}

EMU_API int aclrtMemcpyBatchAsync(void **to, size_t *rooms, void **from, size_t *sizes, size_t count,
                                  aclrtMemcpyBatchAttr *attrs, size_t *starts, size_t attr_count, size_t *failed,
                                  void *stream)
{
    if (failed)
        *failed = SIZE_MAX;
    EMU_DEVICE_CALL();
    if (!to || !rooms || !from || !sizes || !attrs || !starts || !failed)
        return emu_fail(ACL_INVALID_PARAM, "a batch without one of its arrays");
    if (!count || !attr_count || attr_count > count)
        return emu_fail(ACL_RT_PARAM, "a batch of nothing, or with more attributes than copies");
    int kind = batch_kind(attrs, starts, attr_count, count), status = kind < 0 ? -kind : 0;
    batch *made = status ? NULL : batch_new(count);
    if (!made)
        return status ? status : emu_fail(ACL_RT_INTERNAL, "no memory for a task");
    for (size_t i = 0; i < count; i++) {
        if ((status = check_copy(to[i], rooms[i], from[i], sizes[i], kind, false))) {
            *failed = i;
            free(made);
            return status;
        }
        batch_set(made, i, to[i], from[i], sizes[i]);
    }
    return push(made, stream);
}
