/* The owner's side of the shm backend: it only writes its board; readers do the rest. */

#include "shm_board.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

const char pd_shm_magic[8] = "PDSHM01";

struct shm_owner {
    shm_head *head;
    int head_fd, board_fd;
    shm_board *board;
    uint64_t board_bytes;
    uint32_t *free; /* slots, the next one last */
    size_t num_free;
    size_t num_groups;
    struct group {
        uint32_t id;
        uint64_t blocks, first_bit;
    } *groups;
};

int shm_here(char boot[40], uint64_t *pid_namespace)
{
    struct stat status;
    int file = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : read(file, boot, 36);
    if (file >= 0)
        close(file);
    if (got != 36 || stat("/proc/self/ns/pid", &status))
        return pd_fail(ENOTSUP, "/proc does not say what host and pid namespace this is");
    memset(boot + 36, 0, 4);
    *pid_namespace = status.st_ino;
    return 0;
}

/* A memfd of zeros, mapped for us alone to write: sealed against everything that a reader could do to it. */
static int make_memfd(const char *name, uint64_t bytes, void **mapping)
{
    int file = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (file < 0)
        return pd_fail(errno, "memfd_create: %s", strerror(errno));
    if (ftruncate(file, (off_t)bytes) ||
        (*mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)) == MAP_FAILED) {
        int error = errno;
        close(file);
        return pd_fail(error, "a memfd of %llu bytes: %s", (unsigned long long)bytes, strerror(error));
    }
    fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
    fcntl(file, F_ADD_SEALS, F_SEAL_FUTURE_WRITE); /* not in old kernels */
    return file;
}

shm_owner *shm_owner_open(void)
{
    shm_owner *owner = calloc(1, sizeof *owner);
    if (!owner)
        return NULL;
    owner->board_fd = -1;
    owner->head_fd = make_memfd("pd-head", sizeof *owner->head, (void **)&owner->head);
    if (owner->head_fd < 0 || getrandom(owner->head->token, PD_SHM_TOKEN, 0) != PD_SHM_TOKEN) {
        shm_owner_close(owner);
        return NULL;
    }
    memcpy(owner->head->magic, pd_shm_magic, sizeof pd_shm_magic);
    atomic_store(&owner->head->board_fd, -1);
    return owner;
}

static void drop_board(shm_owner *owner)
{
    if (owner->board)
        munmap(owner->board, owner->board_bytes);
    if (owner->board_fd >= 0)
        close(owner->board_fd);
    free(owner->groups);
    free(owner->free);
    owner->board = NULL, owner->groups = NULL, owner->free = NULL;
    owner->board_fd = -1, owner->num_groups = 0;
}

void shm_owner_close(shm_owner *owner)
{
    drop_board(owner);
    if (owner->head_fd >= 0) {
        atomic_store(&owner->head->closed, 1);
        munmap(owner->head, sizeof *owner->head);
        close(owner->head_fd);
    }
    free(owner);
}

int shm_owner_describe(const shm_owner *owner, shm_where *out)
{
    memset(out, 0, sizeof *out);
    memcpy(out->magic, pd_shm_magic, sizeof pd_shm_magic);
    memcpy(out->token, owner->head->token, PD_SHM_TOKEN);
    out->pid = getpid();
    out->head_fd = owner->head_fd;
    return shm_here(out->boot, &out->pid_namespace);
}

/* Number the groups' blocks: one bit each in every slot. Returns the bits of a slot. */
static uint64_t number_groups(shm_owner *owner, const pd_memory *memory)
{
    uint64_t bits = 0;
    for (size_t i = 0; i < memory->num_grids; i++) {
        const pd_grid *grid = &memory->grids[i];
        size_t g = 0;
        while (g < owner->num_groups && owner->groups[g].id != grid->group)
            g++;
        if (g == owner->num_groups)
            owner->groups[owner->num_groups++] = (struct group){grid->group, 0, 0};
        if (owner->groups[g].blocks < grid->num_blocks)
            owner->groups[g].blocks = grid->num_blocks;
    }
    for (size_t g = 0; g < owner->num_groups; g++) {
        owner->groups[g].first_bit = bits;
        bits += owner->groups[g].blocks;
    }
    return bits;
}

static uint64_t first_bit(const shm_owner *owner, uint32_t group)
{
    for (size_t g = 0; g < owner->num_groups; g++)
        if (owner->groups[g].id == group)
            return owner->groups[g].first_bit;
    return 0;
}

/* A board of this memory in `made`, whose head is the owner's; what there is of it stays in `made` after an error. */
static int make_board(shm_owner *made, const pd_memory *memory)
{
    made->groups = calloc(memory->num_grids ? memory->num_grids : 1, sizeof *made->groups);
    made->free = calloc(PD_SHM_SLOTS, sizeof *made->free);
    if (!made->groups || !made->free)
        return pd_fail(ENOMEM, "no memory for %zu groups", memory->num_grids);
    shm_board layout = {.num_regions = memory->num_regions, .num_grids = memory->num_grids};
    memcpy(layout.token, made->head->token, PD_SHM_TOKEN);
    layout.slot_words = sizeof(shm_slot) / 8 + number_groups(made, memory) / 64 + 1;
    layout.regions_at = sizeof layout;
    layout.grids_at = layout.regions_at + memory->num_regions * sizeof(pd_region);
    layout.index_at = layout.grids_at + memory->num_grids * sizeof(shm_grid);
    layout.slots_at = (layout.index_at + PD_SHM_SLOTS * sizeof(shm_entry) + 63) / 64 * 64;
    for (made->num_free = 0; made->num_free < PD_SHM_SLOTS; made->num_free++)
        made->free[made->num_free] = (uint32_t)(PD_SHM_SLOTS - 1 - made->num_free);
    made->board_bytes = layout.slots_at + PD_SHM_SLOTS * layout.slot_words * 8; /* pages come with the first use */
    void *mapping;
    made->board_fd = make_memfd("pd-board", made->board_bytes, &mapping);
    if (made->board_fd < 0)
        return -EIO;
    made->board = mapping;
    *made->board = layout;
    char *base = mapping;
    pd_region *regions = (pd_region *)(base + layout.regions_at);
    for (size_t i = 0; i < memory->num_regions; i++) {
        regions[i] = memory->regions[i];
        if (regions[i].flags & PD_DMA_BUF)
            regions[i].fd = -1; /* no reader can map it */
    }
    shm_grid *grids = (shm_grid *)(base + layout.grids_at);
    for (size_t i = 0; i < memory->num_grids; i++)
        grids[i] = (shm_grid){memory->grids[i], first_bit(made, memory->grids[i].group)};
    return 0;
}

int shm_owner_publish(shm_owner *owner, const pd_memory *memory)
{
    shm_owner made = {.head = owner->head, .head_fd = owner->head_fd, .board_fd = -1};
    int error = make_board(&made, memory);
    if (error) {
        drop_board(&made);
        return error; /* the old board stands */
    }
    for (size_t i = 0; i < memory->num_regions; i++)
        if (memory->regions[i].fd < 0)
            prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0); /* where Yama restricts process_vm_readv */
    atomic_fetch_add(&owner->head->sequence, 1);
    atomic_store(&owner->head->board_fd, made.board_fd);
    atomic_store(&owner->head->board_bytes, made.board_bytes);
    atomic_fetch_add(&owner->head->sequence, 1);
    drop_board(owner); /* only now: whoever opened it saw the sequence change */
    *owner = made;
    return 0;
}

static shm_entry *entry_at(const shm_owner *owner, uint64_t number)
{
    return (shm_entry *)((char *)owner->board + owner->board->index_at) + number % PD_SHM_SLOTS;
}

static shm_slot *slot_at(const shm_owner *owner, uint64_t index)
{
    return (shm_slot *)((char *)owner->board + owner->board->slots_at + index * owner->board->slot_words * 8);
}

/* The index entry of a lease, or NULL. */
static shm_entry *find(const shm_owner *owner, uint64_t number, uint64_t epoch)
{
    for (uint64_t i = 0; owner->board && i < PD_SHM_PROBES; i++) {
        shm_entry *entry = entry_at(owner, number + i);
        unsigned index = atomic_load(entry);
        const shm_slot *slot = index ? slot_at(owner, index - 1) : NULL;
        if (slot && atomic_load(&slot->number) == number && atomic_load(&slot->epoch) == epoch)
            return entry;
    }
    return NULL;
}

/* A free index entry where a lease's may be, or NULL. */
static shm_entry *find_free(const shm_owner *owner, uint64_t number)
{
    for (uint64_t i = 0; i < PD_SHM_PROBES; i++)
        if (!atomic_load(entry_at(owner, number + i)))
            return entry_at(owner, number + i);
    return NULL;
}

static void set_bits(uint64_t *bits, const struct group *group, const pd_blocks *blocks)
{
    for (size_t i = 0; i < blocks->count; i++)
        if (blocks->ids[i] < group->blocks) { /* a block that does not exist cannot be read anyway */
            uint64_t bit = group->first_bit + blocks->ids[i];
            bits[bit / 64] |= 1ull << bit % 64;
        }
}

/* A slot for a lease, with nothing granted yet; NULL after pd_fail. */
static shm_slot *take_slot(shm_owner *owner, const pd_lease *lease, const uint64_t *capability)
{
    shm_entry *entry = find_free(owner, lease->number);
    if (!entry || !owner->num_free)
        return pd_fail(ENOSPC, "too many leases are granted at once: %d fit", PD_SHM_SLOTS), NULL;
    uint32_t index = owner->free[--owner->num_free];
    shm_slot *slot = slot_at(owner, index);
    atomic_fetch_add(&slot->sequence, 1);
    atomic_store(&slot->number, lease->number);
    atomic_store(&slot->epoch, lease->epoch);
    atomic_store(&slot->capability_bytes, lease->capability_bytes);
    for (size_t i = 0; i < PD_MAX_CAPABILITY / 8; i++)
        atomic_store_explicit(&slot->capability[i], capability[i], memory_order_release);
    for (uint64_t i = 0; i < owner->board->slot_words - sizeof(shm_slot) / 8; i++)
        atomic_store_explicit(&slot->bits[i], 0, memory_order_release);
    atomic_store(&slot->used, 1);
    atomic_fetch_add(&slot->sequence, 1);
    atomic_store(entry, index + 1);
    return slot;
}

/* The slot of a lease that is granted already, to be granted other blocks; NULL if there is none. */
static shm_slot *same_slot(shm_owner *owner, const pd_lease *lease, const uint64_t *capability)
{
    shm_entry *entry = find(owner, lease->number, lease->epoch);
    shm_slot *slot = entry ? slot_at(owner, atomic_load(entry) - 1) : NULL;
    bool same = slot && atomic_load(&slot->capability_bytes) == lease->capability_bytes;
    for (size_t i = 0; same && i < PD_MAX_CAPABILITY / 8; i++)
        same = atomic_load(&slot->capability[i]) == capability[i];
    if (slot && !same)
        shm_owner_revoke(owner, lease->number, lease->epoch);
    return same ? slot : NULL;
}

int shm_owner_grant(shm_owner *owner, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    if (!owner->board)
        return pd_fail(EINVAL, "no memory is registered");
    uint64_t words = owner->board->slot_words - sizeof(shm_slot) / 8;
    uint64_t capability[PD_MAX_CAPABILITY / 8] = {0};
    memcpy(capability, lease->capability, lease->capability_bytes);
    uint64_t *bits = calloc(words + 1, sizeof *bits);
    if (!bits)
        return pd_fail(ENOMEM, "no memory for a lease");
    for (size_t g = 0; g < num_groups; g++)
        for (size_t i = 0; i < owner->num_groups; i++)
            if (owner->groups[i].id == blocks[g].group)
                set_bits(bits, &owner->groups[i], &blocks[g]);
    shm_slot *slot = same_slot(owner, lease, capability);
    if (!slot)
        slot = take_slot(owner, lease, capability);
    /* Word by word, in place: a lease that grows while it is read never lacks a block that it had. */
    for (uint64_t i = 0; slot && i < words; i++)
        atomic_store_explicit(&slot->bits[i], bits[i], memory_order_release);
    free(bits);
    return slot ? 0 : -ENOSPC;
}

void shm_owner_revoke(shm_owner *owner, uint64_t number, uint64_t epoch)
{
    shm_entry *entry = find(owner, number, epoch);
    if (!entry)
        return;
    uint32_t index = atomic_load(entry) - 1;
    shm_slot *slot = slot_at(owner, index);
    atomic_fetch_add(&slot->sequence, 1);
    atomic_store(&slot->used, 0);
    atomic_fetch_add(&slot->sequence, 1);
    atomic_store(entry, 0);
    owner->free[owner->num_free++] = index;
}
