/* Reads between NPUs by HIXL (HCCL family: HCCS or RoCE): one-sided, the owner posts nothing. Never run on an NPU by us:
 * proven against an emulation (tests/ascend_emulated).
 *
 * HIXL is a C++ library. hixl.cc is the boundary: built as a second, optional extension module, it makes the C++ objects,
 * catches what they throw and offers the plain functions below; everything else is C. The owner is asked over a connection
 * of our own (service.h) before every slice, for HIXL itself lets whoever is linked read whatever is registered.
 *
 * HIXL's rules, which the code keeps to: a device is set before Initialize, and on every thread that calls; memory must be
 * registered before a link is made, else the link does not know it, so links are made anew when either side registers
 * again; at most 256 registrations; after a time-out the link must be taken down before anything else, and only then can
 * nothing write any more. */
#ifndef PD_HIXL_H
#define PD_HIXL_H

#include <stddef.h>
#include <stdint.h>

enum {
    HIXL_MAX_REGIONS = 256,
    HIXL_ENGINE = 64, /* bytes of "address:port" */
};

typedef enum { /* hixl::Status */
    HIXL_SUCCESS = 0,
    HIXL_PARAM_INVALID = 103900,
    HIXL_TIMEOUT = 103901,
    HIXL_NOT_CONNECTED = 103902,
    HIXL_ALREADY_CONNECTED = 103903,
    HIXL_RESOURCE_EXHAUSTED = 203900,
    HIXL_FAILED = 503900,
    HIXL_THREW = 1, /* ours: an exception came out of the library */
} hixl_status;

typedef struct { /* as hixl::TransferOpDesc */
    uint64_t local, remote, bytes;
} hixl_op;

/* The library's own symbols, which are C++ functions of ordinary linkage: looked up by hixl_engine.c, called by hixl.cc. */
typedef struct {
    void *string;       /* ge::AscendString::AscendString(const char *) */
    void *string_less;  /* ge::AscendString::operator<(const AscendString &) const */
    void *make, *unmake; /* hixl::Hixl::Hixl(), ~Hixl() */
    void *initialize, *finalize;
    void *register_memory, *deregister_memory;
    void *connect, *disconnect;
    void *transfer;
} hixl_symbols;

typedef struct { /* what hixl.cc offers; every function that returns a number returns a hixl_status */
    void (*bind)(const hixl_symbols *found);
    void *(*make)(void); /* NULL: it threw */
    void (*unmake)(void *engine);
    uint32_t (*initialize)(void *engine, const char *name, const char *buffer_pool);
    void (*finalize)(void *engine);
    uint32_t (*enlist)(void *engine, uint64_t address, uint64_t bytes, int on_host, void **handle);
    uint32_t (*delist)(void *engine, void *handle);
    uint32_t (*link)(void *engine, const char *remote, int milliseconds);
    uint32_t (*unlink)(void *engine, const char *remote, int milliseconds);
    uint32_t (*read)(void *engine, const char *remote, const hixl_op *ops, size_t count, int milliseconds);
} hixl_calls;

#endif
