/* A reader's way of asking an owner (service.h): connections for as many threads as ask at once, and what is known of its
 * memory. */
#ifndef PD_ASKER_H
#define PD_ASKER_H

#include "service.h"

enum { ASKER_CLIENTS = 16 };

typedef struct {
    pd_transport *core;
    service_where where;
    int patience_ms; /* for an answer: meanwhile one of the core's threads waits, which others need */
    bool alone; /* the first connection is the only one there will ever be: the backend has begun something with it, and its
                 * owner goes when a question was answered with yes */
    pthread_mutex_t lock; /* guards all below */
    directory *known;
    client spare[ASKER_CLIENTS]; /* that no thread is using */
    int num_spare;
} asker;

/* False after pd_fail, and nothing to close. */
bool asker_open(asker *out, pd_transport *core, const service_where *where, uint32_t patience_ms);
void asker_close(asker *each);
/* PD_DONE: the pieces of a slice may be read, from where `known` says, which is to be released. Else after pd_fail. */
pd_status asker_ask(asker *each, const pd_slice *slice, directory **known);

#endif
