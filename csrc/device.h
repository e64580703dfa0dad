/* A device copies between its own memory and host memory, in batches, by its own engine: what a transport over a wire
 * that cannot reach its memory needs of it. One pd_device_kind per vendor; device.c has an array of them.
 *
 * Every function returns 0, or a negative errno after which pd_last_error has the words. All of them may be called from
 * any thread at any time, except pd_device_close, which must be the last call. */
#ifndef PD_DEVICE_H
#define PD_DEVICE_H

#include "pd.h"

typedef enum { PD_TO_HOST, PD_TO_DEVICE, PD_ON_DEVICE } pd_direction;

typedef struct { /* addresses as integers: those of a device need not be pointers here */
    uint64_t dst, src, bytes;
} pd_move;

typedef struct pd_device_kind {
    const char *name;
    int (*probe)(void);          /* 0, or why there is none here; NULL: there is one everywhere */
    int (*index_of)(const void *at); /* of the one that memory lies on, -1: of none; NULL: there is only number 0 */
    int (*pci)(int index, char *out, int room); /* its PCI address; NULL: it has none that is told */
    void *(*open)(int index);    /* -1: the calling thread's current one; NULL after pd_fail */
    void (*close)(void *own);
    void *(*alloc)(void *own, size_t bytes); /* its own memory, aligned to a page; NULL after pd_fail */
    void (*release)(void *own, void *at);
    int (*pin)(void *own, void *at, size_t bytes); /* host memory, so that its engine can read and write it */
    void (*unpin)(void *own, void *at);
    /* Returns when all of them are done: visible to whatever starts afterwards, here and on the device. The moves of one
     * call are in no order and do not overlap. Any thread, several at once. */
    int (*move)(void *own, const pd_move *moves, size_t count, pd_direction which);
} pd_device_kind;

extern const pd_device_kind pd_cpu, pd_acl, pd_cuda;

typedef struct pd_device pd_device;

int pd_device_probe(const char *name); /* is there one here at all? */
int pd_device_index(const char *name, uint64_t at); /* of the device that memory lies on; -1 */
int pd_device_pci(const char *name, int index, char *out, int room);
int pd_device_open(const char *name, int index, pd_device **out);
void pd_device_close(pd_device *device);
int pd_device_alloc(pd_device *device, size_t bytes, uint64_t *out);
void pd_device_release(pd_device *device, uint64_t at);
int pd_device_pin(pd_device *device, uint64_t at, size_t bytes);
void pd_device_unpin(pd_device *device, uint64_t at);
int pd_device_move(pd_device *device, const pd_move *moves, size_t count, pd_direction which);

#endif
