/* device.h in Python: a capsule per device; pd_connector.transport.device sees to it that none is used once closed. */

#include "module.h"

#include "device.h"

static const char CAPSULE[] = "pd_connector.device";

static pd_device *device_of(PyObject *capsule)
{
    return PyCapsule_GetPointer(capsule, CAPSULE);
}

static PyObject *probe(PyObject *self, PyObject *name)
{
    (void)self;
    return ask(pd_device_probe, name);
}

static PyObject *index_(PyObject *self, PyObject *args)
{
    (void)self;
    const char *name;
    unsigned long long at;
    int index;
    if (!PyArg_ParseTuple(args, "sK:device_index", &name, &at))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    index = pd_device_index(name, at);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(index);
}

static PyObject *pci(PyObject *self, PyObject *args)
{
    (void)self;
    const char *name;
    int index, error;
    char found[64];
    if (!PyArg_ParseTuple(args, "si:device_pci", &name, &index))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = pd_device_pci(name, index, found, sizeof found);
    Py_END_ALLOW_THREADS
    return error ? result(error) : PyUnicode_FromString(found);
}

static PyObject *open_(PyObject *self, PyObject *args)
{
    (void)self;
    const char *name;
    int index, error;
    pd_device *made = NULL;
    if (!PyArg_ParseTuple(args, "si:device_open", &name, &index))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = pd_device_open(name, index, &made);
    Py_END_ALLOW_THREADS
    return error ? result(error) : PyCapsule_New(made, CAPSULE, NULL);
}

static PyObject *close_(PyObject *self, PyObject *capsule)
{
    (void)self;
    pd_device *device = device_of(capsule);
    if (!device)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pd_device_close(device);
    Py_END_ALLOW_THREADS
    return PyCapsule_SetName(capsule, "closed") ? NULL : Py_NewRef(Py_None);
}

static PyObject *alloc(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    Py_ssize_t bytes;
    uint64_t at = 0;
    if (!PyArg_ParseTuple(args, "On:device_alloc", &capsule, &bytes))
        return NULL;
    pd_device *device = device_of(capsule);
    int error = 0;
    if (device) {
        Py_BEGIN_ALLOW_THREADS
        error = pd_device_alloc(device, bytes < 0 ? 0 : (size_t)bytes, &at);
        Py_END_ALLOW_THREADS
    }
    return !device ? NULL : error ? result(error) : PyLong_FromUnsignedLongLong(at);
}

static PyObject *leave(PyObject *args, const char *format, void (*function)(pd_device *, uint64_t))
{
    PyObject *capsule;
    unsigned long long at;
    if (!PyArg_ParseTuple(args, format, &capsule, &at))
        return NULL;
    pd_device *device = device_of(capsule);
    if (!device)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    function(device, at);
    Py_END_ALLOW_THREADS
    return Py_NewRef(Py_None);
}

static PyObject *release(PyObject *self, PyObject *args)
{
    (void)self;
    return leave(args, "OK:device_release", pd_device_release);
}

static PyObject *unpin(PyObject *self, PyObject *args)
{
    (void)self;
    return leave(args, "OK:device_unpin", pd_device_unpin);
}

static PyObject *pin(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    unsigned long long at;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "OKn:device_pin", &capsule, &at, &bytes))
        return NULL;
    pd_device *device = device_of(capsule);
    int error = 0;
    if (device) {
        Py_BEGIN_ALLOW_THREADS
        error = pd_device_pin(device, at, bytes < 0 ? 0 : (size_t)bytes);
        Py_END_ALLOW_THREADS
    }
    return device ? result(error) : NULL;
}

static PyObject *move(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    Py_buffer moves;
    int which, error = 0;
    if (!PyArg_ParseTuple(args, "Oy*i:device_move", &capsule, &moves, &which))
        return NULL;
    pd_device *device = device_of(capsule);
    int fine = device && moves.len % (Py_ssize_t)sizeof(pd_move) == 0 && which >= PD_TO_HOST && which <= PD_ON_DEVICE;
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        error = pd_device_move(device, moves.buf, (size_t)moves.len / sizeof(pd_move), (pd_direction)which);
        Py_END_ALLOW_THREADS
    } else if (device) {
        PyErr_SetString(PyExc_ValueError, "moves are whole triples of 64 bits, in a direction of 0 to 2");
    }
    PyBuffer_Release(&moves);
    return fine ? result(error) : NULL;
}

PyMethodDef device_methods[] = {
    {"device_probe", probe, METH_O, "device_probe(kind) -> why there is none here, or None"},
    {"device_pci", pci, METH_VARARGS, "device_pci(kind, index) -> its PCI address"},
    {"device_index", index_, METH_VARARGS, "device_index(kind, address) -> of the one that memory lies on, or -1"},
    {"device_open", open_, METH_VARARGS, "device_open(kind, index, -1: the current one) -> handle"},
    {"device_close", close_, METH_O, "device_close(handle)"},
    {"device_alloc", alloc, METH_VARARGS, "device_alloc(handle, bytes) -> address"},
    {"device_release", release, METH_VARARGS, "device_release(handle, address)"},
    {"device_pin", pin, METH_VARARGS, "device_pin(handle, address, bytes) of host memory"},
    {"device_unpin", unpin, METH_VARARGS, "device_unpin(handle, address)"},
    {"device_move", move, METH_VARARGS,
     "device_move(handle, (destination, source, bytes) as uint64, 0: to the host, 1: to the device, 2: on the device)"},
    {NULL, NULL, 0, NULL},
};
