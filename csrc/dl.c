/* See dl.h. */

#include "dl.h"

#include "backend.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>

int pd_dl_open(const char *library, const pd_symbol *symbols, size_t count, void *table)
{
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (!handle)
        handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return pd_fail(ENOENT, "%s cannot be opened: %s", library, dlerror());
    for (size_t i = 0; i < count; i++) {
        void *found = dlsym(handle, symbols[i].name);
        if (!found && !symbols[i].optional)
            return pd_fail(ENOSYS, "%s is too old: it has no %s", library, symbols[i].name);
        memcpy((char *)table + symbols[i].offset, &found, sizeof found);
    }
    return 0;
}
