/* What an owner shows the readers on its host, in two memfds that they map read-only.
 *
 * The *head* lasts as long as the agent and says where the current *board* is; the board lists the regions and grids
 * that are registered and has one slot per granted lease, with a bit per block. An index leads from a lease's number to
 * its slot; slots that are free again are used again first, so that no more of the board is in memory than leases were
 * held at once. An owner that registers again makes a new board. Whoever reads a slot checks its sequence number before and after (odd: being written), so that a grant
 * or revocation in between is noticed; every word is read with acquire and written with release order. */
#ifndef PD_SHM_BOARD_H
#define PD_SHM_BOARD_H

#include "backend.h"

#include <stdatomic.h>

enum {
    PD_SHM_TOKEN = 16,
    PD_SHM_SLOTS = 16384, /* leases at once */
    PD_SHM_PROBES = 64,   /* a lease's entry in the index lies at most so far behind where its number points */
};

typedef struct { /* travels in HELLO */
    char magic[8];
    unsigned char token[PD_SHM_TOKEN];
    char boot[40]; /* the kernel's boot id: same text, same host */
    uint64_t pid_namespace;
    int32_t pid, head_fd;
} shm_where;

typedef struct {
    char magic[8];
    unsigned char token[PD_SHM_TOKEN];
    atomic_uint closed;
    atomic_uint sequence; /* of the two below; odd while they change */
    atomic_int board_fd;
    atomic_ullong board_bytes;
} shm_head;

typedef struct {
    unsigned char token[PD_SHM_TOKEN]; /* the head's */
    uint64_t num_regions, num_grids, slot_words;
    uint64_t regions_at, grids_at, index_at, slots_at; /* bytes from the start of the board */
} shm_board;

typedef atomic_uint shm_entry; /* of the index, PD_SHM_SLOTS of them: a slot's number plus one, or 0 */

typedef struct {
    pd_grid grid;
    uint64_t first_bit; /* of the grid's group among the bits of a slot */
} shm_grid;

typedef struct { /* slot_words words; the first ones: */
    atomic_ullong sequence, used, number, epoch, capability_bytes;
    atomic_ullong capability[PD_MAX_CAPABILITY / 8];
    atomic_ullong bits[];
} shm_slot;

extern const char pd_shm_magic[8];

/* The owner's side. */
typedef struct shm_owner shm_owner;
shm_owner *shm_owner_open(void);
void shm_owner_close(shm_owner *owner);
int shm_owner_describe(const shm_owner *owner, shm_where *out);
int shm_owner_publish(shm_owner *owner, const pd_memory *memory);
int shm_owner_grant(shm_owner *owner, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups);
void shm_owner_revoke(shm_owner *owner, uint64_t number, uint64_t epoch);

/* Where we are, as an owner says it and a reader compares. */
int shm_here(char boot[40], uint64_t *pid_namespace);

#endif
