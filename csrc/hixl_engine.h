/* An agent's HIXL engine: the library, registered memory, and the links to other engines; see hixl.h. */
#ifndef PD_HIXL_ENGINE_H
#define PD_HIXL_ENGINE_H

#include "acl.h"
#include "hixl.h"
#include "service.h"

typedef struct { /* pd_options.settings */
    int32_t device; /* of an agent without memory on one; -1: device 0 */
    uint32_t transfer_ms, link_ms;
    char buffer_pool[16]; /* HIXL's option of that name; "" leaves it alone */
} hixl_settings;

typedef struct { /* what pd_describe writes */
    service_where service;
    char engine[HIXL_ENGINE];
} hixl_where;

typedef struct {
    uint64_t address, bytes;
    int on_host;
    void *handle;
} hixl_memory;

/* A link to another engine. HIXL has one per pair of engines, so all that read from an owner share it. */
typedef struct hixl_link hixl_link;

typedef struct {
    pd_transport *core;
    hixl_settings settings;
    char name[HIXL_ENGINE]; /* "address:port" */
    int held; /* a listener that keeps the port until the engine starts; -1 */
    int threads;
    acl_scratch scratch; /* once memory is registered */
    void *context; /* of the device */
    int device;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed;
    void *handle; /* NULL until memory is registered */
    hixl_memory memory[HIXL_MAX_REGIONS];
    size_t num_memory;
    uint64_t generation; /* of the memory */
    hixl_link *links;
} hixl_engine;

int hixl_probe(void);
int hixl_engine_open(hixl_engine *out, pd_transport *core, const pd_options *options); /* negative after pd_fail */
void hixl_engine_close(hixl_engine *each);
/* Everything that is registered from now on, in place of what was. */
int hixl_engine_publish(hixl_engine *each, const pd_memory *memory);
hixl_link *hixl_link_get(hixl_engine *each, const hixl_where *owner); /* NULL after pd_fail */
void hixl_link_put(hixl_engine *each, hixl_link *link);
/* Make the link now, if there is memory that it could know. False after pd_fail. */
bool hixl_link_try(hixl_engine *each, hixl_link *link, uint64_t generation);
/* Read over a link that knows both sides' memory: the owner's of that generation. On return nothing writes any more.
 * PD_DONE; else after pd_fail. */
pd_status hixl_link_read(hixl_engine *each, hixl_link *link, uint64_t generation, const hixl_op *ops, size_t count);

#endif
