/* Reads between NPUs by two-sided HCCL, for hosts without HIXL. Never run on an NPU by us: proven against an emulation
 * (tests/ascend_emulated).
 *
 * A reader and an owner are the two ranks of a communicator of their own, which begins with the reader's connection
 * (service.h). The reader asks for a slice; after a yes the owner's thread of that connection sends the pieces and the
 * reader receives them: both go the same way through the same list, so that sends and receives match one by one. A
 * communicator costs some 200 MB of device memory and up to seconds to make; what waits longer than `transfer_ms` is given
 * up, and then the communicator with it, before the destination may be used again. */

#include "acl.h"
#include "asker.h"
#include "dl.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char magic[8] = "PDHCCL1";

enum { ITEMS = 64, HCCL_OWNER = 0, HCCL_READER = 1, HCCL_SEND = 0, HCCL_RECEIVE = 1, HCCL_BYTES = 7, LOOK_MS = 20, BEGIN_MS = 30000, BEGINNINGS = 64 };

/* --- the library: our own declarations of its public C interface -------------------------------------------------- */

typedef struct {
    char bytes[4108];
} hccl_root;

typedef struct {
    int direction;
    void *at;
    uint64_t count;
    int type;
    uint32_t other;
} hccl_item;

_Static_assert(sizeof(hccl_root) <= SERVICE_EXTRA && sizeof(hccl_item) == 32, "as HCCL has them");

static struct {
    int (*HcclGetRootInfo)(hccl_root *out);
    int (*HcclCommInitRootInfo)(uint32_t ranks, const hccl_root *root, uint32_t rank, void **comm);
    int (*HcclBatchSendRecv)(hccl_item *items, uint32_t count, void *comm, void *stream);
    int (*HcclCommDestroy)(void *comm);
    const char *(*HcclGetErrorString)(int result);
} hccl_library;

#define SYMBOL(name) {#name, offsetof(__typeof__(hccl_library), name), false}

static const pd_symbol symbols[] = {
    SYMBOL(HcclGetRootInfo), SYMBOL(HcclCommInitRootInfo), SYMBOL(HcclBatchSendRecv), SYMBOL(HcclCommDestroy),
    SYMBOL(HcclGetErrorString),
};

static int hccl_probe(void)
{
    static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&opening);
    int error = acl_load();
    if (!error && !hccl_library.HcclGetRootInfo) {
        __typeof__(hccl_library) found;
        error = pd_dl_open("libhccl.so", symbols, sizeof symbols / sizeof *symbols, &found);
        if (!error)
            hccl_library = found;
    }
    pthread_mutex_unlock(&opening);
    return error;
}

static int failed(const char *what, int result)
{
    return pd_fail(EIO, "%s: HCCL result %d (%.80s); see the plog in ~/ascend/log", what, result,
                   hccl_library.HcclGetErrorString(result));
}

/* --- a communicator of two ---------------------------------------------------------------------------------------- */

typedef struct { /* pd_options.settings */
    uint32_t transfer_ms;
} hccl_settings;

typedef struct {
    pd_transport *core;
    hccl_settings settings;
    int threads;
    service *service;
    pthread_mutex_t lock; /* guards the two below */
    void *context;
    int device; /* of the context */
    acl_scratch scratch;
} hccl;

typedef struct {
    hccl *all;
    hccl_root root;
    void *comm, *stream;
} pair;

static void *context_of(hccl *all)
{
    pthread_mutex_lock(&all->lock);
    void *context = all->context;
    pthread_mutex_unlock(&all->lock);
    return context;
}

/* On return nothing of it sends or writes any more. While that cannot be had we stay here, for the destination must not be
 * used again; only an agent that closes gives up, and leaves the stream as it is. */
static void pair_end(pair *each)
{
    pd_transport *core = each->all->core;
    void *context = context_of(each->all);
    if (!each->stream)
        return;
    bool entered;
    while (!(entered = !acl_enter(context)) && !pd_closing_for(core, ACL_LAST_MS))
        usleep(LOOK_MS * 1000);
    if (entered && each->comm)
        hccl_library.HcclCommDestroy(each->comm); /* one that stays costs memory; what moves is the stream's */
    if (!entered || acl_drain(&each->stream, core) == ACL_SYNC_TIMEOUT)
        pd_abandon(core);
    else if (each->stream)
        acl.aclrtDestroyStream(each->stream);
    each->comm = each->stream = NULL;
}

/* HCCL waits minutes for a rank that does not come, and cannot be told to stop: a thread waits for HCCL, and we for the
 * thread as long as the other side is there. One that was left alone ends what it gets, whenever that is. */
typedef struct {
    _Atomic int refs;
    atomic_bool over;
    void *context;
    hccl_root root;
    uint32_t rank;
    void *comm;
    int result;
} beginning;

static atomic_int beginnings; /* of this process, those that were left alone too */

static void beginning_unref(beginning *each)
{
    if (atomic_fetch_sub(&each->refs, 1) == 1) {
        atomic_fetch_sub(&beginnings, 1);
        if (each->comm && !acl_enter(each->context))
            hccl_library.HcclCommDestroy(each->comm);
        free(each);
    }
}

static void *run_beginning(void *argument)
{
    beginning *each = argument;
    if (acl_enter(each->context))
        each->result = -1;
    else
        each->result = hccl_library.HcclCommInitRootInfo(2, &each->root, each->rank, &each->comm);
    atomic_store(&each->over, true);
    beginning_unref(each);
    return NULL;
}

/* Until the thread is over; false after pd_fail: the other side is gone, or it takes too long. */
static bool wait_for(const hccl *all, beginning *each, int fd)
{
    struct pollfd other = {fd, POLLRDHUP, 0};
    int64_t end = net_now_ms() + BEGIN_MS;
    while (!atomic_load(&each->over)) {
        if (poll(&other, 1, LOOK_MS) > 0)
            return pd_fail(EPIPE, "no communicator: the other side gave up"), false;
        if (pd_closing(all->core) || net_now_ms() >= end)
            return pd_fail(ETIMEDOUT, "no communicator within %d s", BEGIN_MS / 1000), false;
    }
    if (each->result)
        each->result < 0 ? pd_fail(EIO, "no communicator: its thread has no device") : failed("no communicator", each->result);
    return !each->result;
}

static bool pair_begin(pair *each, uint32_t rank, int fd)
{
    void *context = context_of(each->all);
    if (!context)
        return pd_fail(EINVAL, "no memory of a device is registered"), false;
    if (acl_enter(context))
        return false;
    acl_error error = acl.aclrtCreateStream(&each->stream);
    if (error)
        return acl_failed("no stream", error), false;
    beginning *made = atomic_fetch_add(&beginnings, 1) < BEGINNINGS ? calloc(1, sizeof *made) : NULL;
    if (!made) {
        atomic_fetch_sub(&beginnings, 1);
        return pd_fail(EAGAIN, "%d communicators are being made already", BEGINNINGS), false;
    }
    *made = (beginning){.refs = 2, .context = context, .root = each->root, .rank = rank};
    pthread_t thread;
    int refused = pd_start(&thread, run_beginning, made);
    if (refused) {
        atomic_fetch_sub(&beginnings, 1);
        free(made);
        return pd_fail(refused, "cannot start a thread: %s", strerror(refused)), false;
    }
    pthread_detach(thread);
    bool begun = wait_for(each->all, made, fd);
    if (begun)
        each->comm = made->comm, made->comm = NULL;
    beginning_unref(made);
    return begun;
}

/* All the pieces, or false after pd_fail: then the communicator is of no use any more. */
static bool pair_move(pair *each, int direction, const pd_memory *memory, const pd_piece *pieces, size_t count)
{
    cursor at = {0, 0, 0};
    for (;;) {
        hccl_item items[ITEMS];
        uint32_t listed = 0;
        uint64_t src, dst, bytes;
        while (listed < ITEMS && cursor_at(&at, memory, pieces, count, &src, &dst, &bytes)) {
            uint64_t here = direction == HCCL_SEND ? src : dst;
            items[listed++] = (hccl_item){direction, (void *)(uintptr_t)here, bytes, HCCL_BYTES,
                                          direction == HCCL_SEND ? HCCL_READER : HCCL_OWNER};
            cursor_move(&at, pieces, bytes);
        }
        if (!listed)
            return true;
        if (!each->comm)
            return pd_fail(EPROTO, "no communicator was begun"), false;
        int result = hccl_library.HcclBatchSendRecv(items, listed, each->comm, each->stream);
        if (result)
            return failed("the read failed", result), false;
        acl_error error = acl.aclrtSynchronizeStreamWithTimeout(each->stream, (int)each->all->settings.transfer_ms);
        if (error)
            return acl_failed("the read failed", error), false;
    }
}

/* --- the owner's side, on the thread of a reader's connection ----------------------------------------------------- */

static void *owner_greet(void *own, unsigned char *extra, size_t *bytes)
{
    hccl *all = own;
    void *context = context_of(all);
    pair *made = context && !acl_enter(context) ? calloc(1, sizeof *made) : NULL;
    if (!made)
        return context ? NULL : (pd_fail(EINVAL, "it has registered no memory of a device"), NULL);
    made->all = all;
    int result = hccl_library.HcclGetRootInfo(&made->root);
    if (result) {
        free(made);
        return failed("no communicator", result), NULL;
    }
    memcpy(extra, &made->root, sizeof made->root);
    *bytes = sizeof made->root;
    return made;
}

static bool owner_begin(void *state, int fd)
{
    return pair_begin(state, HCCL_OWNER, fd);
}

static bool owner_serve(void *state, const pd_memory *memory, const pd_piece *pieces, size_t count)
{
    return pair_move(state, HCCL_SEND, memory, pieces, count);
}

static void owner_end(void *state)
{
    pair_end(state);
    free(state);
}

/* --- the reader's side -------------------------------------------------------------------------------------------- */

typedef struct {
    asker asker;
    pair pair;
    pthread_mutex_t lock; /* one slice at a time: both sides must issue the same in the same order */
    bool broken;
} owner;

static int hccl_can_reach(void *own, const unsigned char *remote, size_t bytes)
{
    (void)own;
    service_where where;
    int used = service_parse(magic, remote, bytes, &where);
    return used < 0 ? used : (size_t)used == bytes ? 0 : pd_fail(EPROTO, "the peer's description is not one of this version of hccl");
}

static void hccl_disconnect(void *peer)
{
    owner *each = peer;
    pair_end(&each->pair);
    asker_close(&each->asker);
    pthread_mutex_destroy(&each->lock);
    free(each);
}

static void *hccl_connect(void *own, const unsigned char *remote, size_t bytes)
{
    service_where where;
    if (hccl_can_reach(own, remote, bytes) || service_parse(magic, remote, bytes, &where) < 0)
        return NULL;
    owner *made = calloc(1, sizeof *made);
    if (!made || !asker_open(&made->asker, ((hccl *)own)->core, &where, ((hccl *)own)->settings.transfer_ms)) {
        free(made);
        return made ? NULL : (pd_fail(ENOMEM, "no memory"), NULL);
    }
    made->asker.alone = true;
    pthread_mutex_init(&made->lock, NULL);
    made->pair.all = own;
    client *first = &made->asker.spare[0];
    bool told = first->extra_bytes == sizeof made->pair.root || (pd_fail(EPROTO, "it broke the protocol: no root info"), false);
    memcpy(&made->pair.root, first->extra, sizeof made->pair.root);
    if (!told || !client_begin(first) || !pair_begin(&made->pair, HCCL_READER, first->fd))
        return hccl_disconnect(made), NULL;
    return made;
}

static pd_status hccl_read(void *peer, const pd_slice *slice)
{
    owner *each = peer;
    directory *known = NULL;
    if (acl_enter(context_of(each->pair.all)))
        return PD_ERROR;
    pthread_mutex_lock(&each->lock);
    pd_status status = each->broken ? PD_PEER_LOST : asker_ask(&each->asker, slice, &known);
    if (each->broken)
        pd_fail(EPIPE, "its communicator was given up");
    else if (status == PD_PEER_LOST)
        each->broken = true;
    if (status == PD_DONE && !pair_move(&each->pair, HCCL_RECEIVE, known->memory, slice->pieces, slice->count)) {
        char words[PD_MAX_WORDS];
        snprintf(words, sizeof words, "%s", pd_last_error());
        each->broken = true;
        pair_end(&each->pair);
        pd_fail(EIO, "%s", words);
        status = PD_PEER_LOST;
    }
    pthread_mutex_unlock(&each->lock);
    if (known)
        directory_release(known);
    return status;
}

/* --- the agent's own ---------------------------------------------------------------------------------------------- */

static void hccl_close(void *own)
{
    hccl *all = own;
    if (all->service)
        service_close(all->service);
    acl_scratch_close(&all->scratch);
    pthread_mutex_destroy(&all->lock);
    free(all);
}

static void *hccl_open(pd_transport *core, const pd_options *options)
{
    static const service_hooks hooks = {owner_greet, owner_begin, owner_serve, owner_end};
    if (hccl_probe())
        return NULL;
    hccl *all = calloc(1, sizeof *all);
    if (!all)
        return pd_fail(ENOMEM, "no memory"), NULL;
    all->core = core;
    all->threads = options->threads;
    pthread_mutex_init(&all->lock, NULL);
    bool fits = options->settings_bytes == sizeof all->settings;
    if (fits)
        memcpy(&all->settings, options->settings, sizeof all->settings);
    else
        pd_fail(EINVAL, "settings of another version");
    if (!fits || !(all->service = service_open(magic, &hooks, all, options))) {
        hccl_close(all);
        return NULL;
    }
    return all;
}

static int hccl_describe(void *own, unsigned char *out, size_t room)
{
    const service_where *where = service_at(((hccl *)own)->service);
    if (room < sizeof *where)
        return pd_fail(ENOSPC, "no room");
    memcpy(out, where, sizeof *where);
    return sizeof *where;
}

static int hccl_publish(void *own, pd_memory *memory)
{
    hccl *all = own;
    int device;
    for (size_t i = 0; i < memory->num_regions; i++)
        if (!(memory->regions[i].flags & PD_OF_DEVICE))
            return pd_fail(EINVAL, "HCCL sends memory of devices only");
    pthread_mutex_lock(&all->lock);
    int error = acl_device_of_all(memory, all->context ? all->device : -1, &device);
    if (!error && !all->context && memory->num_regions) {
        void *context = acl_context(all->device = device);
        error = context ? acl_scratch_open(&all->scratch, all->core, context, all->threads) : -EIO;
        all->context = error ? NULL : context;
    }
    pthread_mutex_unlock(&all->lock);
    return error ? error : service_publish(all->service, memory, NULL);
}

static int hccl_grant(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    return grants_put(service_leases(((hccl *)own)->service), lease, blocks, num_groups);
}

static void hccl_revoke(void *own, uint64_t number, uint64_t epoch)
{
    grants_revoke(service_leases(((hccl *)own)->service), number, epoch);
}

static unsigned char *hccl_buffer(void *own)
{
    return acl_scratch_lend(&((hccl *)own)->scratch);
}

static pd_status hccl_place(void *own, const pd_rows *rows, size_t count)
{
    return acl_scratch_place(&((hccl *)own)->scratch, rows, count);
}

const pd_backend pd_hccl = {
    .name = "hccl",
    .probe = hccl_probe,
    .slice_bytes = PD_MAX_SLICE_BYTES,
    .per_peer = 1,
    .open = hccl_open,
    .close = hccl_close,
    .describe = hccl_describe,
    .publish = hccl_publish,
    .grant = hccl_grant,
    .revoke = hccl_revoke,
    .can_reach = hccl_can_reach,
    .connect = hccl_connect,
    .disconnect = hccl_disconnect,
    .read = hccl_read,
    .buffer = hccl_buffer,
    .place = hccl_place,
};
