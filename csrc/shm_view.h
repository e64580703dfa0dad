/* A reader's view of an owner's board. */
#ifndef PD_SHM_VIEW_H
#define PD_SHM_VIEW_H

#include "shm_board.h"

enum { SHM_TRIES = 1000 }; /* looks at something that changes, before it counts as stuck */

/* One board of the owner as this process has mapped it. */
typedef struct view {
    unsigned sequence;
    const char *board;
    uint64_t bytes;
    shm_board layout; /* this and what it leads to are copies: the owner may scribble on its own */
    pd_region *regions;
    shm_grid *grids;
    const unsigned char **bases; /* per region: where its first byte is mapped, or NULL */
    struct pool {
        int fd;
        void *mapping;
        uint64_t bytes;
    } *pools;
    size_t num_pools;
    struct view *older; /* a thread may still be using it */
} view;

/* All but view_free fail with pd_fail. */
int parse(const unsigned char *remote, size_t bytes, shm_where *where);
const shm_head *map_head(const shm_where *where);
view *view_make(const shm_where *where, const shm_head *head);
void view_free(view *old);
/* Whether memory outside of memfds can be read here at all, tried on the first byte of it. */
int try_foreign(const shm_where *where, const view *seen);

#endif
