/* What an owner leases to readers that ask it: the blocks of every lease, and whether a piece of a read is of them. */
#ifndef PD_GRANTS_H
#define PD_GRANTS_H

#include "backend.h"
#include "table.h"

#include <pthread.h>

typedef struct {
    uint32_t id;
    size_t count;
    uint32_t *ids; /* ascending, each once */
} group;

typedef struct grant {
    struct grant *next; /* of the same number */
    uint64_t epoch;
    size_t capability_bytes, num_groups;
    unsigned char capability[PD_MAX_CAPABILITY];
    group groups[];
} grant;

typedef struct {
    pthread_mutex_t lock; /* guards the two below */
    pd_memory *memory;
    pd_table table; /* by lease number */
} grants;

void grants_open(grants *all);
void grants_close(grants *all);
void grants_publish(grants *all, pd_memory *memory);
int grants_put(grants *all, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups);
void grants_revoke(grants *all, uint64_t number, uint64_t epoch);
grant *grants_find(grants *all, uint64_t number, uint64_t epoch); /* under the lock */
bool grant_opens(const grant *leased, const unsigned char *capability, size_t bytes); /* in constant time */
void grant_free(grant *each);

/* Why a piece cannot be read of `memory`, in `words` (PD_MAX_WORDS); PD_DONE: it can. Without a grant anything may be that
 * exists. */
pd_status grant_judge(const grant *leased, const pd_memory *memory, const pd_piece *piece, char *words);
void grant_refuse(bool known, uint64_t number, uint64_t epoch, char *words);

#endif
