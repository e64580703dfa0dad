/*
 * What the emulated libraries share. libascendcl.so owns all of it and the other two link against it, so that one
 * table of faults and one map of device memory serve the whole process.
 *
 * Tests call emu_faults, emu_calls, emu_alias, emu_adopt, emu_disown and emu_physical; the rest is between libraries.
 */
#ifndef PD_ASCEND_EMU_H
#define PD_ASCEND_EMU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EMU_API __attribute__((visibility("default")))

enum {
    ACL_OK = 0,
    ACL_INVALID_PARAM = 100000,
    ACL_REPEATED_INIT = 100002,
    ACL_RT_PARAM = 107000,
    ACL_RT_NO_CONTEXT = 107002,
    ACL_RT_STREAM_CONTEXT = 107003,
    ACL_RT_SYNC_TIMEOUT = 107020,
    ACL_RT_NOT_SUPPORTED = 207000,
    ACL_RT_NO_MEMORY = 207001,
    ACL_RT_INTERNAL = 507899,
};

/*
 * Faults: "name:nth=code;name:*=code;name:nth=~ms". Replaces the table, zeroes the counters; -1 for a bad text. A name
 * is that of a function, with Hixl before those of the class, or of what happens behind one: "stream" is a copy or an
 * operation of HCCL on a stream's worker, "HixlServe" a request that an engine answers to a remote one.
 */
EMU_API int emu_faults(const char *spec);
EMU_API uint64_t emu_calls(const char *name);
/* Counts a call; sleeps a delay off; true if `*code` is to be returned instead of doing the work. */
EMU_API bool emu_fault(const char *name, int *code);

/* Keeps `why` for aclGetRecentErrMsg and returns `code`. */
EMU_API int emu_fail(int code, const char *why);
EMU_API const char *emu_failure(void);

/* The device of the calling thread's context, -1 without one. */
EMU_API int emu_current_device(void);
/* The number of the board behind a device that ASCEND_RT_VISIBLE_DEVICES renumbered, -1 for none. */
EMU_API int emu_physical(int device);

/* What a range is; outside: it begins in memory that is known and ends beyond it. */
typedef enum { EMU_PAGEABLE, EMU_DEVICE, EMU_PINNED, EMU_OUTSIDE } emu_kind;
EMU_API emu_kind emu_kind_of(const void *pointer, size_t bytes);
/* The device of known memory, -1 for memory that is not. */
EMU_API int emu_device_of(const void *pointer);
/*
 * Each end with what it was when it was checked, pageable for whatever host memory: what was freed meanwhile, and had
 * to be known, is not touched, and the copy fails.
 */
typedef struct {
    void *pointer;
    emu_kind kind;
} emu_end;
EMU_API bool emu_copy(emu_end to, emu_end from, size_t bytes);
/* An address at which a CPU may touch device memory, NULL for other memory. */
EMU_API void *emu_alias(const void *pointer);
/* Memory of somebody else's counts as device memory of the current device (or 0) until it is disowned. */
EMU_API int emu_adopt(void *pointer, size_t bytes);
EMU_API int emu_disown(void *pointer);

/*
 * A task for a stream's worker, run in order; its result, if not 0, is the stream's error. `run` frees `work`, which
 * stays the caller's where the push fails.
 */
typedef int (*emu_run)(void *work);
EMU_API int emu_stream_push(void *stream, emu_run run, void *work);

/* Sockets: every wait ends at a deadline in emu_now_ms's time. 0, or -1 with errno (ETIMEDOUT, EPIPE for the end). */
#define EMU_NEVER INT64_MAX
EMU_API int64_t emu_now_ms(void);
EMU_API int64_t emu_deadline(int64_t ms);
EMU_API int emu_wait(int fd, short events, int64_t deadline);
EMU_API int emu_send(int fd, const void *bytes, size_t count, int64_t deadline);
EMU_API int emu_receive(int fd, void *bytes, size_t count, int64_t deadline);

/* Called in a forked child, which inherits no context, no device memory and no stream. */
void emu_context_forked(void);
void emu_memory_forked(void);
void emu_stream_forked(void);

void *emu_memory_allocate(int device, size_t bytes);
int emu_memory_free(void *pointer, emu_kind kind);
int emu_memory_unpin(void *pointer);
int emu_memory_pin(void *pointer, size_t bytes, int device, bool owned);
void *emu_memory_map(void *pointer, size_t bytes, int device);
void emu_memory_reset(int device);
size_t emu_memory_used(int device);
int emu_stream_drain(int device);

#define EMU_FAULT(name)                 \
    do {                                \
        int code_;                      \
        if (emu_fault((name), &code_))  \
            return code_;               \
    } while (0)

/* How every device call begins. */
#define EMU_DEVICE_CALL()                                                               \
    do {                                                                                \
        EMU_FAULT(__func__);                                                            \
        if (emu_current_device() < 0)                                                   \
            return emu_fail(ACL_RT_NO_CONTEXT, "the calling thread has no context");    \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
