/* An owner that is asked before it is read from: for backends whose bytes go by a vendor's own ways.
 *
 * A reader has as many TCP connections to an owner as it has threads that read. Over each it asks for one slice after the
 * other; the owner judges by its leases, a thread per connection, and what moves the bytes then is the backend's business.
 * The end of a connection tells each side that the other is gone.
 *
 *     reader -> owner   HELLO     whom I mean
 *     owner -> reader   PD_DONE   with what the backend needs to begin
 *     reader -> owner   MEMORY
 *     owner -> reader   PD_DONE   regions and grids, as they are now
 *     reader -> owner   BEGIN     I begin with what came after HELLO, do so too (of backends that have something to begin)
 *     reader -> owner   READ      may I read these pieces of a lease?
 *     owner -> reader   PD_DONE   yes; SERVICE_STALE: ask for MEMORY again; or why not
 *     reader -> owner   GO        do your part then (of backends whose owners have one)
 *
 * Every message is a head and so many bytes; all numbers are little-endian. Nothing that the other side says is believed. */
#ifndef PD_SERVICE_H
#define PD_SERVICE_H

#include "grants.h"
#include "net.h"
#include "pieces.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire's numbers are little-endian");

enum {
    SERVICE_INSTANCE = 16,
    SERVICE_EXTRA = 8192,       /* bytes of a backend's own in the answer to HELLO */
    SERVICE_EXPORT = 64,        /* bytes by which another process finds a region */
    SERVICE_STRANGERS = 64, /* of them that have not greeted: then the oldest goes */
    SERVICE_CONNECTIONS = 512,  /* that an owner serves at once */
    SERVICE_MESSAGE = 16 << 20, /* bytes of the largest message */
    SERVICE_STALE = 100,        /* a status: the reader knows memory that is not registered any more */
};

typedef struct { /* what pd_describe writes; backends may append */
    char magic[8];
    unsigned char instance[SERVICE_INSTANCE]; /* tells an owner from whoever binds its port next; only peers are told it */
    net_address at;
} service_where;

typedef struct { /* how another process finds a region */
    unsigned char handle[SERVICE_EXPORT];
    uint64_t offset;
} service_export;

/* What the backend does for one reader's connection, on its thread; all may be NULL. */
typedef struct {
    void *(*greet)(void *own, unsigned char *extra, size_t *bytes); /* NULL: the reader is refused, after pd_fail */
    bool (*begin)(void *state, int fd); /* once, when the reader says so, whose connection that is; false: hang up */
    bool (*serve)(void *state, const pd_memory *memory, const pd_piece *pieces, size_t count); /* after a yes, told to go */
    void (*end)(void *state);
} service_hooks;

typedef struct service service;

service *service_open(const char *magic, const service_hooks *hooks, void *own, const pd_options *options); /* after pd_fail */
void service_close(service *all);
const service_where *service_at(const service *all);
grants *service_leases(service *all);
/* `exports`, one per region or NULL, become the service's. */
int service_publish(service *all, pd_memory *memory, service_export *exports);

/* --- the reader's side: one connection; a thread at a time ---------------------------------------------------------- */

typedef struct {
    int fd;
    unsigned char instance[SERVICE_INSTANCE];
    unsigned char extra[SERVICE_EXTRA];
    size_t extra_bytes;
    unsigned owed; /* answers to questions that nobody waits for any more */
} client;

typedef struct { /* an owner's memory as a reader knows it */
    _Atomic int refs;
    uint64_t generation;
    pd_memory *memory; /* addresses are the owner's */
    service_export *exports;
} directory;

/* Whether what is waited for is still wanted. */
typedef struct {
    bool (*wanted)(void *what);
    void *what;
} patience;

int service_parse(const char *magic, const unsigned char *remote, size_t bytes, service_where *out); /* bytes used, or < 0 */
/* PD_DONE; PD_PEER_LOST or PD_CANCELLED after pd_fail. `until` may be NULL. */
pd_status client_open(client *out, const service_where *where, int milliseconds, const patience *until);
void client_close(client *each);
bool client_begin(client *each); /* false after pd_fail */
directory *client_directory(client *each); /* NULL after pd_fail; the connection is of no use then */
void directory_release(directory *each);
/* May these pieces be read? PD_DONE, SERVICE_STALE, or why not, after pd_fail. PD_PEER_LOST: the connection is
 * of no use any more. */
int client_ask(client *each, const directory *known, const pd_slice *slice, int milliseconds, patience until);
bool client_go(client *each); /* false after pd_fail */

#endif
