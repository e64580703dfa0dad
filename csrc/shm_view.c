/* Looking at an owner: its description, its head and boards, its pools. Nothing it says is believed unchecked. */

#include "shm_view.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

int parse(const unsigned char *remote, size_t bytes, shm_where *where)
{
    if (bytes != sizeof *where || memcmp(remote, pd_shm_magic, sizeof pd_shm_magic))
        return pd_fail(EPROTO, "the peer's description is not one of shm");
    memcpy(where, remote, sizeof *where);
    char boot[40];
    uint64_t pid_namespace;
    if (shm_here(boot, &pid_namespace))
        return -ENOTSUP;
    if (memcmp(boot, where->boot, sizeof boot))
        return pd_fail(EREMOTE, "the peer is on another host");
    if (pid_namespace != where->pid_namespace)
        return pd_fail(EREMOTE, "the peer is in another pid namespace: let both containers share one (docker run --pid)");
    return 0;
}

/* Open a regular file for reading and nothing else: opening a pipe or a device could block, or do something. */
static int open_file(const char *path)
{
    struct stat status;
    char again[64];
    int file = -1, place = open(path, O_PATH | O_CLOEXEC);
    if (place < 0)
        return -1;
    snprintf(again, sizeof again, "/proc/self/fd/%d", place);
    if (!fstat(place, &status) && S_ISREG(status.st_mode))
        file = open(again, O_RDONLY | O_CLOEXEC);
    else
        errno = ESRCH;
    int error = errno;
    close(place);
    errno = error;
    return file;
}

/* Map a memfd of the owner for reading; its size must be `bytes` and stay so. */
static const void *map_file(const shm_where *where, int fd, uint64_t bytes)
{
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", where->pid, fd);
    int file = open_file(path);
    if (file < 0 && errno == EACCES)
        return pd_fail(EACCES, "process %d may not be looked into: run both as the same user", where->pid), NULL;
    if (file < 0)
        return pd_fail(errno, "process %d or its agent is gone (%s)", where->pid, strerror(errno)), NULL;
    int seals = fcntl(file, F_GET_SEALS);
    void *mapping = MAP_FAILED;
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(file, &status) || (uint64_t)status.st_size < bytes)
        pd_fail(EPROTO, "process %d or its agent is gone: descriptor %d is something else", where->pid, fd);
    else if ((mapping = mmap(NULL, bytes, PROT_READ, MAP_SHARED, file, 0)) == MAP_FAILED)
        pd_fail(errno, "cannot map %llu bytes: %s", (unsigned long long)bytes, strerror(errno));
    close(file);
    return mapping == MAP_FAILED ? NULL : mapping;
}

const shm_head *map_head(const shm_where *where)
{
    const shm_head *head = map_file(where, where->head_fd, sizeof *head);
    if (head && !memcmp(head->magic, pd_shm_magic, sizeof pd_shm_magic) &&
        !memcmp(head->token, where->token, PD_SHM_TOKEN) && !atomic_load(&head->closed))
        return head;
    if (head) {
        munmap((void *)head, sizeof *head);
        pd_fail(ESRCH, "the agent is gone, process %d has another or none", where->pid);
    }
    return NULL;
}

void view_free(view *old)
{
    for (size_t i = 0; i < old->num_pools; i++)
        munmap(old->pools[i].mapping, old->pools[i].bytes);
    if (old->board)
        munmap((void *)old->board, old->bytes);
    free(old->regions);
    free(old->grids);
    free(old->bases);
    free(old->pools);
    free(old);
}

/* The board must say of itself nothing that leads out of it. */
static bool sound(const view *made)
{
    const shm_board *board = &made->layout;
    return board->num_regions < 1 << 20 && board->num_grids < 1 << 24 && board->slot_words >= sizeof(shm_slot) / 8 &&
           board->slot_words < 1u << 31 && board->regions_at <= made->bytes && board->grids_at <= made->bytes &&
           board->index_at <= made->bytes && board->index_at % sizeof(shm_entry) == 0 &&
           PD_SHM_SLOTS * sizeof(shm_entry) <= made->bytes - board->index_at && board->slots_at <= made->bytes &&
           board->slots_at % 8 == 0 &&
           board->num_regions * sizeof(pd_region) <= made->bytes - board->regions_at &&
           board->num_grids * sizeof(shm_grid) <= made->bytes - board->grids_at &&
           PD_SHM_SLOTS * board->slot_words * 8 <= made->bytes - board->slots_at;
}

static bool copy_board(const shm_where *where, int fd, view *made)
{
    if (made->bytes < sizeof made->layout || !(made->board = map_file(where, fd, made->bytes)))
        return pd_fail(EPROTO, "process %d shows no board", where->pid), false;
    memcpy(&made->layout, made->board, sizeof made->layout);
    if (memcmp(made->layout.token, where->token, PD_SHM_TOKEN))
        return pd_fail(EPROTO, "process %d shows the board of another agent", where->pid), false;
    if (!sound(made))
        return pd_fail(EPROTO, "the board of process %d makes no sense", where->pid), false;
    size_t regions = made->layout.num_regions, grids = made->layout.num_grids;
    made->regions = calloc(regions + 1, sizeof *made->regions);
    made->grids = calloc(grids + 1, sizeof *made->grids);
    made->bases = calloc(regions + 1, sizeof *made->bases);
    made->pools = calloc(regions + 1, sizeof *made->pools);
    if (!made->regions || !made->grids || !made->bases || !made->pools)
        return pd_fail(ENOMEM, "no memory for the board of process %d", where->pid), false;
    memcpy(made->regions, made->board + made->layout.regions_at, regions * sizeof *made->regions);
    memcpy(made->grids, made->board + made->layout.grids_at, grids * sizeof *made->grids);
    return true;
}

static int map_pools(const shm_where *where, view *made)
{
    for (size_t i = 0; i < made->layout.num_regions; i++) {
        const pd_region *region = &made->regions[i];
        if (region->fd < 0)
            continue;
        size_t p = 0;
        while (p < made->num_pools && made->pools[p].fd != region->fd)
            p++;
        if (p == made->num_pools) {
            const void *mapping = map_file(where, region->fd, region->fd_length);
            if (!mapping)
                return -EIO;
            made->pools[made->num_pools++] = (struct pool){region->fd, (void *)mapping, region->fd_length};
        }
        if (region->fd_offset > made->pools[p].bytes || region->length > made->pools[p].bytes - region->fd_offset)
            return pd_fail(EPROTO, "region %zu does not lie in its memfd", i);
        made->bases[i] = (const unsigned char *)made->pools[p].mapping + region->fd_offset;
    }
    return 0;
}

/* The board that the head names at this moment; NULL after pd_fail. */
static view *view_once(const shm_where *where, const shm_head *head)
{
    view *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory"), NULL;
    made->sequence = atomic_load(&head->sequence);
    int fd = atomic_load(&head->board_fd);
    made->bytes = atomic_load(&head->board_bytes);
    if (fd < 0)
        pd_fail(EAGAIN, "process %d has registered no memory", where->pid);
    else if (copy_board(where, fd, made) && !map_pools(where, made))
        return made;
    view_free(made);
    return NULL;
}

view *view_make(const shm_where *where, const shm_head *head)
{
    for (int i = 0; i < SHM_TRIES; i++, sched_yield()) { /* an owner that was stopped while it wrote must not hold us */
        unsigned before = atomic_load(&head->sequence);
        if (before % 2)
            continue;
        view *made = view_once(where, head);
        if (atomic_load(&head->sequence) == before)
            return made;
        if (made)
            view_free(made); /* of a board that was replaced meanwhile */
    }
    return pd_fail(EAGAIN, "process %d keeps changing its board", where->pid), NULL;
}

int try_foreign(const shm_where *where, const view *seen)
{
    for (size_t i = 0; i < seen->layout.num_regions; i++) {
        unsigned char byte;
        struct iovec here = {&byte, 1}, there = {(void *)(uintptr_t)seen->regions[i].address, 1};
        if (seen->bases[i] || process_vm_readv(where->pid, &here, 1, &there, 1, 0) == 1)
            continue;
        if (errno == EPERM)
            return pd_fail(EPERM, "process_vm_readv of process %d is not permitted: run both as the same user, in containers "
                                  "with the capability SYS_PTRACE (docker run --cap-add SYS_PTRACE), or put the KV cache "
                                  "into a shared pool", where->pid);
        return pd_fail(errno, "process_vm_readv of process %d: %s", where->pid, strerror(errno));
    }
    return 0;
}
