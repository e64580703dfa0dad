/* Reads between processes of one host: straight from a mapped memfd where the owner's memory lies in one, otherwise
 * through the kernel (process_vm_readv). The reader does everything; what it may read it learns from the owner's board
 * (shm_board.h). It is trusted not to overstep: whoever could, being the same user, could read the owner anyway. */

#include "shm_view.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { IOVECS = 512 };

typedef struct {
    shm_where where;
    const shm_head *head;
    int pidfd;
    pthread_mutex_t lock;
    _Atomic(view *) current;
} shm_peer;

/* --- peers -------------------------------------------------------------------------------------------------------- */

static int shm_can_reach(void *own, const unsigned char *remote, size_t bytes)
{
    (void)own;
    shm_where where;
    if (parse(remote, bytes, &where))
        return -EREMOTE;
    const shm_head *head = map_head(&where);
    if (!head)
        return -ESRCH;
    view *seen = view_make(&where, head);
    int error = seen ? try_foreign(&where, seen) : -EIO;
    if (seen)
        view_free(seen);
    munmap((void *)head, sizeof *head);
    return error;
}

static void shm_disconnect(void *own)
{
    shm_peer *peer = own;
    for (view *each = atomic_load(&peer->current), *older; each; each = older) {
        older = each->older;
        view_free(each);
    }
    munmap((void *)peer->head, sizeof *peer->head);
    close(peer->pidfd);
    pthread_mutex_destroy(&peer->lock);
    free(peer);
}

static void *shm_connect(void *own, const unsigned char *remote, size_t bytes)
{
    (void)own;
    shm_where where;
    if (parse(remote, bytes, &where))
        return NULL;
    int pidfd = (int)syscall(SYS_pidfd_open, where.pid, 0); /* first, so that what follows is of this very process */
    if (pidfd < 0)
        return pd_fail(errno, "process %d is gone (%s)", where.pid, strerror(errno)), NULL;
    const shm_head *head = map_head(&where);
    view *seen = head ? view_make(&where, head) : NULL;
    shm_peer *peer = seen && !try_foreign(&where, seen) ? calloc(1, sizeof *peer) : NULL;
    if (!peer) {
        if (seen)
            view_free(seen);
        if (head)
            munmap((void *)head, sizeof *head);
        close(pidfd);
        return NULL;
    }
    *peer = (shm_peer){.where = where, .head = head, .pidfd = pidfd};
    atomic_store(&peer->current, seen);
    pthread_mutex_init(&peer->lock, NULL);
    return peer;
}

static bool gone(const shm_peer *peer)
{
    struct pollfd exited = {peer->pidfd, POLLIN, 0};
    if (!atomic_load(&peer->head->closed) && poll(&exited, 1, 0) <= 0) /* -1: a signal; it did not exit */
        return false;
    pd_fail(ESRCH, "its process ended or its agent was closed");
    return true;
}

/* The owner's current board; NULL after pd_fail. */
static const view *look(shm_peer *peer)
{
    view *seen = atomic_load(&peer->current);
    if (seen->sequence == atomic_load(&peer->head->sequence))
        return seen;
    pthread_mutex_lock(&peer->lock);
    view *latest = atomic_load(&peer->current);
    if (latest == seen && (latest = view_make(&peer->where, peer->head))) {
        latest->older = seen;
        atomic_store(&peer->current, latest);
    }
    pthread_mutex_unlock(&peer->lock);
    return latest;
}

/* --- permission --------------------------------------------------------------------------------------------------- */

typedef enum { OTHER, CHANGING, COVERED, NOT_COVERED } finding;

/* Whether a slot is the lease's and covers the slice. */
static finding inspect(const view *seen, const shm_slot *slot, const pd_slice *slice)
{
    const pd_lease *lease = slice->lease;
    unsigned long long sequence = atomic_load(&slot->sequence);
    if (sequence % 2)
        return CHANGING;
    if (!atomic_load(&slot->used) || atomic_load(&slot->number) != lease->number ||
        atomic_load(&slot->epoch) != lease->epoch)
        return atomic_load(&slot->sequence) == sequence ? OTHER : CHANGING;
    uint64_t capability[PD_MAX_CAPABILITY / 8] = {0};
    memcpy(capability, lease->capability, lease->capability_bytes);
    uint64_t wrong = atomic_load(&slot->capability_bytes) ^ lease->capability_bytes;
    for (size_t i = 0; i < PD_MAX_CAPABILITY / 8; i++)
        wrong |= atomic_load_explicit(&slot->capability[i], memory_order_acquire) ^ capability[i];
    for (size_t i = 0; !wrong && i < slice->count; i++) {
        const pd_piece *piece = &slice->pieces[i];
        uint64_t bit = seen->grids[piece->grid].first_bit + piece->block;
        for (uint64_t end = bit + piece->blocks; bit < end; bit++)
            wrong |= ~atomic_load_explicit(&slot->bits[bit / 64], memory_order_acquire) >> bit % 64 & 1;
    }
    if (atomic_load(&slot->sequence) != sequence)
        return CHANGING;
    return wrong ? NOT_COVERED : COVERED;
}

static pd_status permit(const view *seen, const pd_slice *slice)
{
    const shm_entry *index = (const shm_entry *)(seen->board + seen->layout.index_at);
    const char *slots = seen->board + seen->layout.slots_at;
    unsigned long long number = slice->lease->number, epoch = slice->lease->epoch;
    for (uint64_t i = 0; i < PD_SHM_PROBES; i++) {
        unsigned entry = atomic_load(&index[(number + i) % PD_SHM_SLOTS]);
        if (!entry || entry > PD_SHM_SLOTS)
            continue;
        finding found;
        int tries = 0;
        const void *slot = slots + (entry - 1) * seen->layout.slot_words * 8;
        while ((found = inspect(seen, slot, slice)) == CHANGING && ++tries < SHM_TRIES)
            sched_yield();
        if (found == COVERED)
            return PD_DONE;
        if (found == NOT_COVERED)
            return pd_fail(EACCES, "lease %llu epoch %llu does not cover this read", number, epoch), PD_NOT_GRANTED;
    }
    pd_fail(EACCES, "lease %llu epoch %llu is not granted here (not yet, or no longer)", number, epoch);
    return PD_NOT_GRANTED;
}

/* --- copying ------------------------------------------------------------------------------------------------------ */

/* Every byte of a piece lies in a block of the owner's, every bit of its blocks in a slot, or pd_fail says why not. */
static bool exists(const view *seen, const pd_piece *piece)
{
    if (piece->grid >= seen->layout.num_grids)
        return pd_fail(EINVAL, "grid %llu does not exist, there are %llu", (unsigned long long)piece->grid,
                       (unsigned long long)seen->layout.num_grids), false;
    const shm_grid *shown = &seen->grids[piece->grid];
    const pd_grid *grid = &shown->grid;
    uint64_t last = (uint64_t)piece->block + piece->blocks - 1, end;
    if (last >= grid->num_blocks)
        return pd_fail(EINVAL, "block %llu does not exist, grid %llu has %llu", (unsigned long long)last,
                       (unsigned long long)piece->grid, (unsigned long long)grid->num_blocks), false;
    if (piece->bytes > grid->block_bytes || piece->offset > grid->block_bytes - piece->bytes)
        return pd_fail(EINVAL, "%llu bytes at %llu do not lie in the blocks of grid %llu (%llu bytes)",
                       (unsigned long long)piece->bytes, (unsigned long long)piece->offset,
                       (unsigned long long)piece->grid, (unsigned long long)grid->block_bytes), false;
    uint64_t bits = (seen->layout.slot_words - sizeof(shm_slot) / 8) * 64;
    if (grid->region >= seen->layout.num_regions || shown->first_bit >= bits || last >= bits - shown->first_bit ||
        __builtin_mul_overflow(last, grid->block_stride, &end) || __builtin_add_overflow(end, grid->offset, &end) ||
        __builtin_add_overflow(end, grid->block_bytes, &end) || end > seen->regions[grid->region].length)
        return pd_fail(EPROTO, "the peer's board makes no sense"), false;
    return true;
}

typedef struct {
    pid_t pid;
    size_t count;
    struct iovec here[IOVECS], there[IOVECS];
} batch;

static pd_status flush(batch *each)
{
    size_t at = 0;
    while (at < each->count) {
        ssize_t got = process_vm_readv(each->pid, each->here + at, each->count - at, each->there + at, each->count - at, 0);
        if (got <= 0) {
            int error = got ? errno : EFAULT;
            pd_fail(error, "process_vm_readv: %s", strerror(error));
            return error == ESRCH ? PD_PEER_LOST : PD_ERROR;
        }
        /* A short read: go on behind it; a byte that cannot be read ends the next call. */
        for (; at < each->count && (size_t)got >= each->here[at].iov_len; at++)
            got -= (ssize_t)each->here[at].iov_len;
        if (got) {
            each->here[at].iov_base = (char *)each->here[at].iov_base + got, each->here[at].iov_len -= (size_t)got;
            each->there[at].iov_base = (char *)each->there[at].iov_base + got, each->there[at].iov_len -= (size_t)got;
        }
    }
    each->count = 0;
    return PD_DONE;
}

/* `bytes` from `offset` of a region of the owner. */
static pd_status fetch(const view *seen, size_t region, uint64_t offset, unsigned char *dst, uint64_t bytes, batch *foreign)
{
    if (seen->bases[region]) {
        pd_copy(dst, seen->bases[region] + offset, bytes);
        return PD_DONE;
    }
    void *there = (void *)(uintptr_t)(seen->regions[region].address + offset);
    foreign->here[foreign->count] = (struct iovec){dst, bytes};
    foreign->there[foreign->count] = (struct iovec){there, bytes};
    return ++foreign->count < IOVECS ? PD_DONE : flush(foreign);
}

static pd_status shm_read(void *own, const pd_slice *slice)
{
    shm_peer *peer = own;
    const view *seen = gone(peer) ? NULL : look(peer);
    if (!seen)
        return PD_PEER_LOST;
    for (size_t i = 0; i < slice->count; i++)
        if (!exists(seen, &slice->pieces[i]))
            return PD_ERROR;
    pd_status status = permit(seen, slice);
    batch foreign;
    foreign.pid = peer->where.pid, foreign.count = 0;
    for (size_t i = 0; status == PD_DONE && i < slice->count; i++) {
        const pd_piece *piece = &slice->pieces[i];
        const pd_grid *grid = &seen->grids[piece->grid].grid;
        uint64_t at = grid->offset + piece->block * grid->block_stride + piece->offset;
        if (grid->block_stride == piece->bytes) {
            status = fetch(seen, grid->region, at, piece->dst, piece->bytes * piece->blocks, &foreign);
            continue;
        }
        for (uint32_t k = 0; status == PD_DONE && k < piece->blocks; k++)
            status = fetch(seen, grid->region, at + k * grid->block_stride, piece->dst + k * piece->bytes, piece->bytes,
                           &foreign);
    }
    if (status == PD_DONE)
        status = flush(&foreign);
    return (status == PD_DONE || status == PD_ERROR) && gone(peer) ? PD_PEER_LOST : status;
}

/* --- the owner's side, in shm_owner.c ----------------------------------------------------------------------------- */

static void *shm_open_owner(pd_transport *core, const pd_options *options)
{
    (void)core, (void)options;
    return shm_owner_open();
}

static void shm_close_owner(void *own)
{
    shm_owner_close(own);
}

static int shm_describe(void *own, unsigned char *out, size_t room)
{
    shm_where where;
    int error = room < sizeof where ? pd_fail(ENOSPC, "no room") : shm_owner_describe(own, &where);
    if (error)
        return error;
    memcpy(out, &where, sizeof where);
    return sizeof where;
}

static int shm_publish(void *own, pd_memory *memory)
{
    return shm_owner_publish(own, memory);
}

static int shm_grant(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    return shm_owner_grant(own, lease, blocks, num_groups);
}

static void shm_revoke(void *own, uint64_t number, uint64_t epoch)
{
    shm_owner_revoke(own, number, epoch);
}

const pd_backend pd_shm = {
    .name = "shm",
    .open = shm_open_owner,
    .close = shm_close_owner,
    .describe = shm_describe,
    .publish = shm_publish,
    .grant = shm_grant,
    .revoke = shm_revoke,
    .can_reach = shm_can_reach,
    .connect = shm_connect,
    .disconnect = shm_disconnect,
    .read = shm_read,
};
