/* Reads between GPUs of one host, straight from the owner's memory, which the driver maps here (CUDA IPC). Never run on
 * a GPU by us: proven against an emulation (tests/cuda_emulated).
 *
 * The reader asks for a slice (service.h) and after a yes its GPU copies it; the owner's process and GPU do nothing. A
 * peer that asked and was told where memory lies could also read it without asking: as with shm, it is a process of the
 * same user and is trusted not to. */

#include "asker.h"
#include "cuda_mover.h"
#include "cuda_window.h"
#include "shm_board.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char magic[8] = "PDCUDA1";

enum { GPUS = 16, MOVES = 1024 };

typedef struct { /* what pd_describe writes */
    service_where service;
    uint32_t num_gpus; /* that the owner's process sees: which of them holds its memory is not known yet */
    char boot[40];
    uint64_t pid_namespace;
    cuda_uuid gpus[GPUS];
} cuda_where;

_Static_assert(sizeof(cuda_where) <= PD_MAX_DESCRIPTION, "it travels in HELLO");

typedef struct { /* pd_options.settings */
    uint32_t transfer_ms;
} cuda_settings;

typedef struct cuda_agent {
    struct cuda_agent *next; /* of this process */
    pid_t pid;               /* a fork's copy of the list has its parent's */
    pd_transport *core;
    cuda_settings settings;
    size_t num_buffers, lent;
    service *service;
    cuda_mover mover; /* open once there is memory of a GPU; so is what follows */
    cuda_pointer buffers;
    atomic_bool ready;
} cuda_agent;

typedef struct {
    cuda_agent *all;
    bool ours; /* the owner is of this process */
    asker asker;
    pthread_mutex_t lock; /* guards the window */
    cuda_window *window;
} owner;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the list */
static cuda_agent *agents;

/* --- the agent's own ---------------------------------------------------------------------------------------------- */

static void cuda_close(void *own)
{
    cuda_agent *all = own;
    void *before;
    pthread_mutex_lock(&lock);
    for (cuda_agent **at = &agents; *at; at = &(*at)->next)
        if (*at == all) {
            *at = all->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    if (all->service)
        service_close(all->service);
    if (all->mover.stuck)
        pd_abandon(all->core);
    if (all->buffers && !all->mover.stuck && !cuda_enter(&all->mover.context, &before)) {
        cuda.cuMemFree_v2(all->buffers);
        cuda_leave(before);
    }
    cuda_mover_close(&all->mover);
    free(all);
}

static void *cuda_open(pd_transport *core, const pd_options *options)
{
    static const service_hooks none = {NULL, NULL, NULL, NULL};
    if (cuda_probe())
        return NULL;
    cuda_agent *all = calloc(1, sizeof *all);
    if (!all)
        return pd_fail(ENOMEM, "no memory"), NULL;
    all->core = core;
    all->pid = getpid();
    all->num_buffers = (size_t)options->threads;
    bool fits = options->settings_bytes == sizeof all->settings;
    if (fits)
        memcpy(&all->settings, options->settings, sizeof all->settings);
    else
        pd_fail(EINVAL, "settings of another version");
    if (!fits || !(all->service = service_open(magic, &none, all, options))) {
        free(all);
        return NULL;
    }
    pthread_mutex_lock(&lock);
    all->next = agents;
    agents = all;
    pthread_mutex_unlock(&lock);
    return all;
}

static int cuda_describe(void *own, unsigned char *out, size_t room)
{
    cuda_agent *all = own;
    cuda_where where = {.service = *service_at(all->service)};
    int count = 0, device, error = shm_here(where.boot, &where.pid_namespace);
    if (error || room < sizeof where)
        return error ? error : pd_fail(ENOSPC, "no room");
    cuda_error failed = cuda.cuDeviceGetCount(&count);
    for (int i = 0; !failed && i < count && where.num_gpus < GPUS; i++)
        if (!cuda.cuDeviceGet(&device, i) && !cuda.cuDeviceGetUuid_v2(&where.gpus[where.num_gpus], device))
            where.num_gpus++;
    memcpy(out, &where, sizeof where);
    return sizeof where;
}

/* What reads need, once the GPU is known. */
static int begin(cuda_agent *all, int device)
{
    void *before;
    if (cuda_mover_open(&all->mover, device))
        return -EIO;
    bool entered = !cuda_enter(&all->mover.context, &before);
    cuda_error error = entered ? cuda.cuMemAlloc_v2(&all->buffers, all->num_buffers * PD_MAX_SLICE_BYTES) : 0;
    if (entered)
        cuda_leave(before);
    if (error)
        cuda_failed("no memory on the GPU for buffers", error);
    if (error || !entered) {
        all->buffers = 0;
        cuda_mover_close(&all->mover);
        return -EIO;
    }
    atomic_store(&all->ready, true);
    return 0;
}

static int cuda_publish(void *own, pd_memory *memory)
{
    cuda_agent *all = own;
    bool ready = atomic_load(&all->ready);
    int device;
    void *before;
    if (!memory->num_regions)
        return service_publish(all->service, memory, NULL);
    if (cuda_device_of_all(memory, ready ? all->mover.context.device : -1, &device) || (!ready && begin(all, device)) ||
        cuda_enter(&all->mover.context, &before))
        return -EINVAL;
    service_export *exports = cuda_export(memory);
    cuda_leave(before);
    return exports ? service_publish(all->service, memory, exports) : -EINVAL;
}

static int cuda_grant(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    return grants_put(service_leases(((cuda_agent *)own)->service), lease, blocks, num_groups);
}

static void cuda_revoke(void *own, uint64_t number, uint64_t epoch)
{
    grants_revoke(service_leases(((cuda_agent *)own)->service), number, epoch);
}

/* --- owners ------------------------------------------------------------------------------------------------------- */

static int parse(const unsigned char *remote, size_t bytes, cuda_where *where)
{
    char boot[40];
    uint64_t pid_namespace;
    if (service_parse(magic, remote, bytes, &where->service) < 0)
        return -EPROTO;
    if (bytes != sizeof *where)
        return pd_fail(EPROTO, "the peer's description is not one of this version of cuda");
    memcpy(where, remote, sizeof *where);
    if (where->num_gpus > GPUS)
        return pd_fail(EPROTO, "the peer's description makes no sense");
    if (shm_here(boot, &pid_namespace))
        return -ENOTSUP;
    if (memcmp(boot, where->boot, sizeof boot))
        return pd_fail(EREMOTE, "the peer is on another host");
    if (pid_namespace != where->pid_namespace)
        return pd_fail(EREMOTE,
                       "the peer is in another pid namespace: let both containers share one (docker run --pid --ipc)");
    return 0;
}

/* Whether one of our GPUs (or the one that our memory is on) reaches this one, or it is not known here. */
static bool reaches(const cuda_agent *all, const cuda_uuid *gpu, int count)
{
    int theirs = -1, device;
    cuda_uuid uuid;
    for (int i = 0; i < count && theirs < 0; i++)
        if (!cuda.cuDeviceGet(&device, i) && !cuda.cuDeviceGetUuid_v2(&uuid, device) &&
            !memcmp(&uuid, gpu, sizeof uuid))
            theirs = device;
    if (theirs < 0)
        return true; /* hidden by CUDA_VISIBLE_DEVICES: opening its memory will tell */
    for (int i = 0; i < count; i++) {
        int can = 0;
        if (cuda.cuDeviceGet(&device, i) || (atomic_load(&all->ready) && device != all->mover.context.device))
            continue;
        if (device == theirs || (!cuda.cuDeviceCanAccessPeer(&can, device, theirs) && can))
            return true;
    }
    return false;
}

static int cuda_can_reach(void *own, const unsigned char *remote, size_t bytes)
{
    cuda_where where;
    int count = 0, error = parse(remote, bytes, &where);
    if (error)
        return error;
    cuda_error failed = cuda.cuDeviceGetCount(&count);
    if (failed)
        return cuda_failed("no GPU can be used", failed);
    bool some = !where.num_gpus;
    for (uint32_t i = 0; i < where.num_gpus && !some; i++)
        some = reaches(own, &where.gpus[i], count);
    if (!some)
        return pd_fail(EREMOTE, "none of the peer's GPUs can be reached from ours: see nvidia-smi topo -p2p r");
    return 0;
}

static bool is_ours(const service_where *where)
{
    bool ours = false;
    pthread_mutex_lock(&lock);
    for (const cuda_agent *each = agents; each && !ours; each = each->next)
        ours = each->pid == getpid() && !memcmp(service_at(each->service)->instance, where->instance, SERVICE_INSTANCE);
    pthread_mutex_unlock(&lock);
    return ours;
}

static void cuda_disconnect(void *peer)
{
    owner *each = peer;
    cuda_window_release(&each->all->mover, each->window);
    asker_close(&each->asker);
    pthread_mutex_destroy(&each->lock);
    free(each);
}

static void *cuda_connect(void *own, const unsigned char *remote, size_t bytes)
{
    cuda_agent *all = own;
    cuda_where where;
    if (cuda_can_reach(own, remote, bytes) || parse(remote, bytes, &where))
        return NULL;
    if (!atomic_load(&all->ready))
        return pd_fail(EINVAL, "no memory of a GPU is registered here"), NULL;
    owner *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory"), NULL;
    if (!asker_open(&made->asker, all->core, &where.service, all->settings.transfer_ms)) {
        free(made);
        return NULL;
    }
    made->all = all;
    made->ours = is_ours(&where.service);
    pthread_mutex_init(&made->lock, NULL);
    made->window = cuda_window_open(&all->mover, made->asker.known, made->ours);
    if (!made->window) {
        char words[PD_MAX_WORDS];
        memcpy(words, pd_last_error(), sizeof words);
        cuda_disconnect(made);
        return pd_fail(EIO, "%s", words), NULL;
    }
    return made;
}

/* --- reads -------------------------------------------------------------------------------------------------------- */

/* The owner's memory as the directory has it; NULL after pd_fail. */
static cuda_window *window_of(owner *each, const directory *known)
{
    cuda_window *old = NULL;
    pthread_mutex_lock(&each->lock);
    cuda_window *found = each->window;
    if (found->generation != known->generation)
        found = cuda_window_open(&each->all->mover, known, each->ours);
    if (found && found->generation > each->window->generation) {
        old = each->window; /* whoever is in it has a reference of its own */
        each->window = found;
    }
    if (found && found == each->window)
        atomic_fetch_add(&found->refs, 1);
    pthread_mutex_unlock(&each->lock);
    cuda_window_release(&each->all->mover, old);
    return found;
}

static pd_status read_window(const cuda_window *window, cuda_agent *all, const pd_slice *slice)
{
    pd_move moves[MOVES];
    cursor at = {0, 0, 0};
    for (;;) {
        size_t count = 0;
        pd_move *next = moves;
        while (count < MOVES && cursor_at(&at, window->memory, slice->pieces, slice->count, &next->src, &next->dst,
                                          &next->bytes)) {
            cursor_move(&at, slice->pieces, next->bytes);
            count++, next++;
        }
        if (!count)
            return PD_DONE;
        if (cuda_mover_run(&all->mover, moves, count, window->reachable, (int)all->settings.transfer_ms, all->core))
            return PD_ERROR;
    }
}

static pd_status cuda_read(void *peer, const pd_slice *slice)
{
    owner *each = peer;
    directory *known = NULL;
    pd_status status = asker_ask(&each->asker, slice, &known);
    if (status != PD_DONE)
        return status;
    cuda_window *window = window_of(each, known);
    status = window ? read_window(window, each->all, slice) : PD_ERROR;
    if (window) {
        char words[PD_MAX_WORDS];
        memcpy(words, pd_last_error(), sizeof words);
        cuda_window_release(&each->all->mover, window);
        pd_fail(EIO, "%s", words);
    }
    directory_release(known);
    return status;
}

static unsigned char *cuda_buffer(void *own)
{
    cuda_agent *all = own;
    if (all->lent == all->num_buffers)
        return pd_fail(ENOMEM, "no buffer is left"), NULL;
    return (unsigned char *)(uintptr_t)(all->buffers + all->lent++ * PD_MAX_SLICE_BYTES);
}

static pd_status cuda_place(void *own, const pd_rows *rows, size_t count)
{
    cuda_agent *all = own;
    return cuda_mover_place(&all->mover, rows, count, true, (int)all->settings.transfer_ms, all->core) ? PD_ERROR : PD_DONE;
}

const pd_backend pd_cuda_ipc = {
    .name = "cuda",
    .probe = cuda_probe,
    .slice_bytes = PD_MAX_SLICE_BYTES,
    .per_peer = 2,
    .open = cuda_open,
    .close = cuda_close,
    .describe = cuda_describe,
    .publish = cuda_publish,
    .grant = cuda_grant,
    .revoke = cuda_revoke,
    .can_reach = cuda_can_reach,
    .connect = cuda_connect,
    .disconnect = cuda_disconnect,
    .read = cuda_read,
    .buffer = cuda_buffer,
    .place = cuda_place,
};
