/* Vendors' libraries, opened where there are any: nothing is linked against, so that one wheel imports everywhere. */
#ifndef PD_DL_H
#define PD_DL_H

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    const char *name;
    size_t offset; /* of a pointer to it in the table */
    bool optional; /* else the library is too old without it */
} pd_symbol;

/* Open `library` (one that this process has already, before any other) and fill `table`. 0, or a negative errno after
 * pd_fail. It is never closed: its threads and handlers may outlive us. */
int pd_dl_open(const char *library, const pd_symbol *symbols, size_t count, void *table);

#endif
