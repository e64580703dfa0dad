/* pd.h as the module pd_connector._native, in the limited API; module*.c are the files that know Python. */

#include "module.h"

#include "pd.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

enum { RELEASE_GIL_FROM = 16384 }; /* bytes; below, a copy takes less than giving the lock away */

static PyObject *copy(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer dst, src;
    if (!PyArg_ParseTuple(args, "w*y*:copy", &dst, &src))
        return NULL;
    int fits = dst.len == src.len;
    if (!fits) {
        PyErr_Format(PyExc_ValueError, "copy of %zd bytes into %zd", src.len, dst.len);
    } else if (src.len >= RELEASE_GIL_FROM) {
        Py_BEGIN_ALLOW_THREADS
        pd_copy(dst.buf, src.buf, (size_t)src.len);
        Py_END_ALLOW_THREADS
    } else {
        pd_copy(dst.buf, src.buf, (size_t)src.len);
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    return fits ? Py_NewRef(Py_None) : NULL;
}

/* --- transports: a capsule per handle; pd_connector.transport.native sees to it that none is used once closed -------- */

static const char CAPSULE[] = "pd_connector.transport";

static pd_transport *transport_of(PyObject *capsule)
{
    return PyCapsule_GetPointer(capsule, CAPSULE);
}

PyObject *result(int error)
{
    if (error >= 0)
        return Py_NewRef(Py_None);
    PyErr_SetString(PyExc_RuntimeError, pd_last_error());
    return NULL;
}

/* None, or the words of the call that failed. */
static PyObject *reason(int error)
{
    return error ? PyUnicode_DecodeUTF8(pd_last_error(), (Py_ssize_t)strlen(pd_last_error()), "replace") : Py_NewRef(Py_None);
}

PyObject *ask(int (*question)(const char *), PyObject *word)
{
    PyObject *bytes = PyUnicode_AsUTF8String(word);
    const char *name = bytes ? PyBytes_AsString(bytes) : NULL;
    int error = 0;
    if (name) {
        Py_BEGIN_ALLOW_THREADS
        error = question(name);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(bytes);
    return name ? reason(error) : NULL;
}

static PyObject *probe(PyObject *self, PyObject *backend)
{
    (void)self;
    return ask(pd_probe, backend);
}

static PyObject *dma_buf(PyObject *self, PyObject *device)
{
    (void)self;
    return ask(pd_dma_buf, device);
}

static PyObject *open_(PyObject *self, PyObject *args)
{
    (void)self;
    const char *backend;
    Py_buffer cpus, settings;
    pd_options options = {0};
    if (!PyArg_ParseTuple(args, "siy*pssiy*:open", &backend, &options.threads, &cpus, &options.pin, &options.host,
                          &options.advertise, &options.port, &settings))
        return NULL;
    options.settings = settings.buf, options.settings_bytes = (size_t)settings.len;
    options.cpus = cpus.buf;
    options.num_cpus = (size_t)cpus.len / sizeof(int);
    pd_transport *made = NULL;
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = pd_open(backend, &options, &made);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&settings);
    PyBuffer_Release(&cpus);
    return error ? result(error) : PyCapsule_New(made, CAPSULE, NULL);
}

static PyObject *tcp_lanes(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer cpus;
    pd_options options = {0};
    int most, count;
    double found[4];
    if (!PyArg_ParseTuple(args, "y*i:tcp_lanes", &cpus, &most))
        return NULL;
    options.cpus = cpus.buf;
    options.num_cpus = (size_t)cpus.len / sizeof(int);
    Py_BEGIN_ALLOW_THREADS
    count = pd_tcp_lanes(&options, most, found);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&cpus);
    PyObject *list = count < 0 ? result(count) : PyList_New(0);
    for (int i = 0; list && i < count; i++) {
        PyObject *row = Py_BuildValue("id", 1 << i, found[i]);
        if (!row || PyList_Append(list, row))
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *close_(PyObject *self, PyObject *capsule)
{
    (void)self;
    pd_transport *transport = transport_of(capsule);
    if (!transport)
        return NULL;
    int abandoned;
    Py_BEGIN_ALLOW_THREADS
    abandoned = pd_close(transport);
    Py_END_ALLOW_THREADS
    return PyCapsule_SetName(capsule, "closed") ? NULL : PyBool_FromLong(!abandoned);
}

static PyObject *fileno_(PyObject *self, PyObject *capsule)
{
    (void)self;
    pd_transport *transport = transport_of(capsule);
    return transport ? PyLong_FromLong(pd_fileno(transport)) : NULL;
}

static PyObject *describe(PyObject *self, PyObject *capsule)
{
    (void)self;
    unsigned char out[PD_MAX_DESCRIPTION];
    pd_transport *transport = transport_of(capsule);
    int bytes = transport ? pd_describe(transport, out, sizeof out) : 0;
    if (!transport || bytes < 0)
        return transport ? result(bytes) : NULL;
    return PyBytes_FromStringAndSize((char *)out, bytes);
}

static PyObject *can_reach(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    Py_buffer remote;
    if (!PyArg_ParseTuple(args, "Oy*:can_reach", &capsule, &remote))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    int error = 0;
    if (transport) {
        Py_BEGIN_ALLOW_THREADS
        error = pd_can_reach(transport, remote.buf, (size_t)remote.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&remote);
    if (!transport)
        return NULL;
    return reason(error);
}

enum { MAX_COUNTERS = 64 };

static PyObject *counters(PyObject *self, PyObject *capsule)
{
    (void)self;
    pd_counter found[MAX_COUNTERS];
    pd_transport *transport = transport_of(capsule);
    PyObject *made = transport ? PyDict_New() : NULL;
    int count = made ? pd_counters(transport, found, MAX_COUNTERS) : 0;
    for (int i = 0; i < count; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(found[i].value);
        if (!value || PyDict_SetItemString(made, found[i].name, value))
            Py_CLEAR(made);
        Py_XDECREF(value);
        if (!made)
            return NULL;
    }
    return made;
}

static PyObject *register_(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    Py_buffer regions, grids;
    if (!PyArg_ParseTuple(args, "Oy*y*:register", &capsule, &regions, &grids))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    int error = 0;
    if (transport) {
        Py_BEGIN_ALLOW_THREADS
        error = pd_register(transport, regions.buf, (size_t)regions.len / sizeof(pd_region), grids.buf,
                            (size_t)grids.len / sizeof(pd_grid));
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&regions);
    PyBuffer_Release(&grids);
    return transport ? result(error) : NULL;
}

enum { MAX_GROUPS = 256 };

static PyObject *grant(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule, *groups;
    Py_buffer capability, views[MAX_GROUPS];
    unsigned long long number, epoch;
    if (!PyArg_ParseTuple(args, "OKKy*O!:grant", &capsule, &number, &epoch, &capability, &PyList_Type, &groups))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    pd_blocks blocks[MAX_GROUPS];
    Py_ssize_t count = PyList_Size(groups), held = 0;
    bool fine = transport && count <= MAX_GROUPS && capability.len <= PD_MAX_CAPABILITY;
    if (transport && !fine)
        PyErr_SetString(PyExc_RuntimeError, "too many groups, or too long a capability");
    for (; fine && held < count; held++) {
        fine = PyArg_ParseTuple(PyList_GetItem(groups, held), "Iy*", &blocks[held].group, &views[held]);
        if (!fine)
            break;
        blocks[held].ids = views[held].buf;
        blocks[held].count = (size_t)views[held].len / sizeof(uint32_t);
    }
    int error = 0;
    if (fine) {
        pd_lease lease = {number, epoch, capability.buf, (size_t)capability.len};
        error = pd_grant(transport, &lease, blocks, (size_t)count);
    }
    while (held--)
        PyBuffer_Release(&views[held]);
    PyBuffer_Release(&capability);
    return fine ? result(error) : NULL;
}

static PyObject *revoke_(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    unsigned long long number, epoch;
    if (!PyArg_ParseTuple(args, "OKK:revoke", &capsule, &number, &epoch))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    return transport ? result(pd_revoke(transport, number, epoch)) : NULL;
}

static PyObject *connect_(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    unsigned long long peer, tag;
    const char *name;
    Py_buffer remote;
    if (!PyArg_ParseTuple(args, "OKsy*K:connect", &capsule, &peer, &name, &remote, &tag))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    int error = transport ? pd_connect(transport, peer, name, remote.buf, (size_t)remote.len, tag) : 0;
    PyBuffer_Release(&remote);
    return transport ? result(error) : NULL;
}

static PyObject *disconnect(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    unsigned long long peer;
    if (!PyArg_ParseTuple(args, "OK:disconnect", &capsule, &peer))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    return transport ? result(pd_disconnect(transport, peer)) : NULL;
}

static PyObject *post_read(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    unsigned long long peer, number, epoch, tag;
    Py_buffer capability, runs, patterns;
    unsigned int src_step, dst_step;
    int priority;
    if (!PyArg_ParseTuple(args, "OKKKy*y*y*IIKi:post_read", &capsule, &peer, &number, &epoch, &capability, &runs, &patterns,
                          &src_step, &dst_step, &tag, &priority))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    int error = 0;
    if (transport) {
        pd_lease lease = {number, epoch, capability.buf, (size_t)capability.len};
        pd_plan plan = {runs.buf, patterns.buf, (size_t)runs.len / sizeof(pd_run),
                        (size_t)patterns.len / sizeof(pd_pattern), src_step, dst_step};
        error = pd_post_read(transport, peer, &lease, &plan, tag, priority);
    }
    PyBuffer_Release(&capability);
    PyBuffer_Release(&runs);
    PyBuffer_Release(&patterns);
    return transport ? result(error) : NULL;
}

static PyObject *cancel(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    unsigned long long tag;
    if (!PyArg_ParseTuple(args, "OK:cancel", &capsule, &tag))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    return transport ? result(pd_cancel(transport, tag)) : NULL;
}

static PyObject *fence(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    unsigned long long peer, tag;
    if (!PyArg_ParseTuple(args, "OKK:fence", &capsule, &peer, &tag))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    return transport ? result(pd_fence(transport, peer, tag)) : NULL;
}

enum { POLL_BATCH = 64 };

static PyObject *poll_(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    int limit;
    if (!PyArg_ParseTuple(args, "Oi:poll", &capsule, &limit))
        return NULL;
    pd_transport *transport = transport_of(capsule);
    PyObject *list = transport ? PyList_New(0) : NULL;
    pd_completion got[POLL_BATCH];
    int count = list ? pd_poll(transport, got, limit < POLL_BATCH ? limit : POLL_BATCH) : 0;
    for (int i = 0; i < count; i++) {
        PyObject *words = PyUnicode_DecodeUTF8(got[i].words, (Py_ssize_t)strlen(got[i].words), "replace");
        PyObject *row = words ? Py_BuildValue("KiN", (unsigned long long)got[i].tag, (int)got[i].status, words) : NULL;
        if (!row || PyList_Append(list, row)) {
            Py_XDECREF(row);
            Py_DECREF(list);
            return NULL;
        }
        Py_DECREF(row);
    }
    return list;
}

static PyObject *copiers(PyObject *self, PyObject *none)
{
    (void)self, (void)none;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < pd_copier_count(); i++) {
        const char *name = pd_copier_name(i);
        PyObject *word = name ? PyUnicode_FromString(name) : NULL;
        if (name && (!word || PyList_Append(list, word)))
            Py_CLEAR(list);
        Py_XDECREF(word);
    }
    return list;
}

static PyObject *limits(PyObject *self, PyObject *args)
{
    (void)self;
    Py_ssize_t chunk, chunks;
    int huge, error;
    double found[4];
    if (!PyArg_ParseTuple(args, "nnp:limits", &chunk, &chunks, &huge))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = chunk > 0 && chunks > 0 ? pd_limits((size_t)chunk, (size_t)chunks, huge, found) : -EINVAL;
    Py_END_ALLOW_THREADS
    if (error)
        return PyErr_Format(PyExc_RuntimeError, "no limits of %zd chunks of %zd bytes: %s", chunks, chunk, strerror(-error));
    return Py_BuildValue("dddd", found[0], found[1], found[2], found[3]);
}

static PyMethodDef methods[] = {
    {"copy", copy, METH_VARARGS, "copy(dst, src): bytes between contiguous buffers of one length that do not overlap."},
    {"copiers", copiers, METH_NOARGS, "copiers() -> names of those that run on this processor, best first"},
    {"limits", limits, METH_VARARGS, "limits(chunk, chunks, huge) -> GB/s (memcpy by 1, 2 threads; streaming by 1, 2)"},
    {"probe", probe, METH_O, "probe(backend) -> why it cannot work here, or None"},
    {"dma_buf", dma_buf, METH_O, "dma_buf(RDMA device) -> why it takes no memory of other devices as dma-bufs, or None"},
    {"open", open_, METH_VARARGS,
     "open(backend, threads, cpus as ints, pin, host, advertise, port, settings of the backend) -> handle"},
    {"counters", counters, METH_O, "counters(handle) -> {name: count}"},
    {"tcp_lanes", tcp_lanes, METH_VARARGS, "tcp_lanes(cpus as ints, most) -> [(lanes, GB/s over the loopback)]"},
    {"close", close_, METH_O, "close(handle)"},
    {"fileno", fileno_, METH_O, "fileno(handle) -> int"},
    {"describe", describe, METH_O, "describe(handle) -> bytes"},
    {"can_reach", can_reach, METH_VARARGS, "can_reach(handle, remote) -> str | None"},
    {"register", register_, METH_VARARGS, "register(handle, regions, grids), packed as in pd.h"},
    {"grant", grant, METH_VARARGS, "grant(handle, number, epoch, capability, [(group, ids as uint32)])"},
    {"revoke", revoke_, METH_VARARGS, "revoke(handle, number, epoch)"},
    {"connect", connect_, METH_VARARGS, "connect(handle, peer, name, remote, tag)"},
    {"disconnect", disconnect, METH_VARARGS, "disconnect(handle, peer)"},
    {"post_read", post_read, METH_VARARGS,
     "post_read(handle, peer, number, epoch, capability, runs, patterns, src_step, dst_step, tag, priority), packed as in "
     "pd.h"},
    {"cancel", cancel, METH_VARARGS, "cancel(handle, tag)"},
    {"fence", fence, METH_VARARGS, "fence(handle, peer, tag)"},
    {"poll", poll_, METH_VARARGS, "poll(handle, limit) -> [(tag, status, words)], at most 64"},
    {NULL, NULL, 0, NULL},
};

static int add_devices(PyObject *made)
{
    return PyModule_AddFunctions(made, device_methods);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_devices}, {0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "pd_connector._native", .m_doc = "The native data plane.", .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module);
}
