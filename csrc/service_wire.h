/* Messages of service.h, as both sides have them. */
#ifndef PD_SERVICE_WIRE_H
#define PD_SERVICE_WIRE_H

#include "service.h"

enum { SERVICE_GREETING_MS = 10000 };
enum { SERVICE_HELLO = 1, SERVICE_MEMORY, SERVICE_BEGIN, SERVICE_READ, SERVICE_GO };

typedef struct {
    uint32_t kind, bytes; /* of an answer: its status instead */
} service_head;

typedef struct {
    char magic[8];
    unsigned char instance[SERVICE_INSTANCE];
} service_hello;

typedef struct {
    uint64_t generation;
    uint32_t num_regions, num_grids;
} service_memory; /* then the regions and grids */

typedef struct {
    uint64_t address, length;
    service_export found;
} service_region;

typedef struct {
    uint64_t generation, number, epoch;
    uint32_t pieces, capability_bytes;
    unsigned char capability[PD_MAX_CAPABILITY];
} service_ask;

typedef struct {
    uint64_t grid, offset, bytes;
    uint32_t block, blocks;
} service_piece;

bool service_block(int fd); /* its calls wait from now on, as long as they are told below */
/* All of it, or false: the connection is of no use any more. Without `milliseconds` (-1) the first byte may take as long as
 * it likes; the wait ends early when nobody wants it. */
bool service_put(int fd, const void *data, size_t bytes);
bool service_get(int fd, void *data, size_t bytes, int milliseconds, const patience *until);

#endif
