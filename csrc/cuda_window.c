/* See cuda_window.h. */

#include "cuda_window.h"

#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(cuda_ipc_handle) == SERVICE_EXPORT, "a handle travels as it is");

/* --- the owner's side --------------------------------------------------------------------------------------------- */

static int export_one(const pd_region *region, service_export *out)
{
    cuda_pointer base = 0;
    size_t bytes = 0;
    cuda_ipc_handle handle;
    cuda_error error = cuda.cuMemGetAddressRange_v2(&base, &bytes, region->address);
    if (!error)
        error = cuda.cuIpcGetMemHandle(&handle, base);
    if (error == CUDA_INVALID_VALUE || error == 801)
        return pd_fail(EINVAL,
                       "this memory cannot be shown to other processes: PYTORCH_CUDA_ALLOC_CONF must have neither "
                       "expandable_segments:True nor backend:cudaMallocAsync (CUDA error %d)", error);
    if (error)
        return cuda_failed("memory cannot be shown to other processes", error);
    if (region->length > bytes - (region->address - base))
        return pd_fail(EINVAL, "a region goes on behind the end of its allocation");
    memcpy(out->handle, handle.bytes, sizeof handle.bytes);
    out->offset = region->address - base;
    return 0;
}

service_export *cuda_export(const pd_memory *memory)
{
    service_export *made = calloc(memory->num_regions + 1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory"), NULL;
    for (size_t i = 0; i < memory->num_regions; i++)
        if (export_one(&memory->regions[i], &made[i])) {
            free(made);
            return NULL;
        }
    return made;
}

/* --- handles that are open in this process ------------------------------------------------------------------------ */

/* All transports share them: older drivers open a handle once per process, and refuse the second time. */
typedef struct opened {
    struct opened *next;
    void *context;
    cuda_ipc_handle handle;
    cuda_pointer at;
    size_t bytes;
    unsigned refs;
} opened;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the list */
static opened *all;

/* Under the lock; NULL after pd_fail. */
static opened *open_new(const cuda_context *context, const cuda_ipc_handle *handle)
{
    opened *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory"), NULL;
    *made = (opened){all, context->handle, *handle, 0, 0, 0};
    cuda_pointer base;
    cuda_error error = cuda.cuIpcOpenMemHandle_v2(&made->at, *handle, CUDA_IPC_LAZY_PEER_ACCESS);
    if (error) {
        free(made);
        return cuda_failed("the peer's memory cannot be opened", error), NULL;
    }
    error = cuda.cuMemGetAddressRange_v2(&base, &made->bytes, made->at);
    if (error) {
        cuda.cuIpcCloseMemHandle(made->at);
        free(made);
        return cuda_failed("the peer's memory cannot be opened", error), NULL;
    }
    return all = made;
}

/* Where the allocation of a handle lies here, and its size; 0 after pd_fail. */
static cuda_pointer handle_open(const cuda_context *context, const cuda_ipc_handle *handle, size_t *bytes)
{
    pthread_mutex_lock(&lock);
    opened *found = all;
    while (found && (found->context != context->handle || memcmp(&found->handle, handle, sizeof *handle)))
        found = found->next;
    if (!found)
        found = open_new(context, handle);
    if (found)
        found->refs++;
    cuda_pointer at = found ? found->at : 0;
    *bytes = found ? found->bytes : 0;
    pthread_mutex_unlock(&lock);
    return at;
}

static void handle_close(const cuda_context *context, cuda_pointer at)
{
    pthread_mutex_lock(&lock);
    opened **link = &all;
    while (*link && ((*link)->at != at || (*link)->context != context->handle))
        link = &(*link)->next;
    opened *found = *link;
    if (found && !--found->refs) {
        *link = found->next;
        cuda.cuIpcCloseMemHandle(found->at);
        free(found);
    }
    pthread_mutex_unlock(&lock);
}

/* --- the reader's side -------------------------------------------------------------------------------------------- */

void cuda_window_release(const cuda_mover *by, cuda_window *each)
{
    if (!each || atomic_fetch_sub(&each->refs, 1) != 1 || atomic_load(&by->stuck))
        return; /* what a stuck GPU may still read stays where it is */
    const cuda_context *context = &by->context;
    void *before;
    if (each->num_opened && !cuda_enter(context, &before)) {
        for (size_t i = 0; i < each->num_opened; i++)
            handle_close(context, each->opened[i]);
        cuda_leave(before);
    }
    pd_release(each->memory);
    free(each->opened);
    free(each);
}

/* A region of another process's, whose words are not believed; false after pd_fail. */
static bool open_region(const cuda_context *context, cuda_window *made, const service_export *from, pd_region *region)
{
    cuda_ipc_handle handle;
    size_t bytes;
    memcpy(handle.bytes, from->handle, sizeof handle.bytes);
    cuda_pointer at = handle_open(context, &handle, &bytes);
    if (!at)
        return false;
    made->opened[made->num_opened++] = at;
    if (from->offset > bytes || region->length > bytes - from->offset)
        return pd_fail(EPROTO, "it broke the protocol: a region does not lie in its allocation"), false;
    region->address = at + from->offset;
    return true;
}

/* A region of this process's, by the words of whoever named one of its agents; false after pd_fail. */
static bool holds(const pd_region *region)
{
    cuda_pointer base;
    size_t bytes;
    if (!cuda.cuMemGetAddressRange_v2(&base, &bytes, region->address) && region->length <= bytes &&
        region->address - base <= bytes - region->length)
        return true;
    return pd_fail(EPROTO, "it broke the protocol: a region does not lie in its allocation"), false;
}

cuda_window *cuda_window_open(const cuda_mover *by, const directory *known, bool ours)
{
    const cuda_context *context = &by->context;
    const pd_memory *told = known->memory;
    cuda_window *made = calloc(1, sizeof *made);
    void *before;
    if (made) {
        *made = (cuda_window){.refs = 1, .generation = known->generation, .reachable = true};
        made->memory = memory_make(told->regions, told->num_regions, told->grids, told->num_grids);
        made->opened = calloc(told->num_regions + 1, sizeof *made->opened);
    }
    if (!made || !made->memory || !made->opened) {
        cuda_window_release(by, made);
        return pd_fail(ENOMEM, "no memory"), NULL;
    }
    bool entered = !cuda_enter(context, &before), fine = entered;
    for (size_t i = 0; fine && i < told->num_regions; i++) {
        const pd_region *each = &told->regions[i];
        fine = ours ? holds(each) : open_region(context, made, &known->exports[i], &made->memory->regions[i]);
        made->reachable &= !ours || cuda_device_of(each->address) == context->device;
    }
    if (entered)
        cuda_leave(before);
    if (fine)
        return made;
    char words[PD_MAX_WORDS];
    memcpy(words, pd_last_error(), sizeof words);
    cuda_window_release(by, made);
    pd_fail(EIO, "%s", words);
    return NULL;
}
