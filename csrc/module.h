/* What the files that know Python share; nothing else includes it. */
#ifndef PD_MODULE_H
#define PD_MODULE_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* module.c */
PyObject *result(int error); /* None, or RuntimeError with the words of the call that failed */
PyObject *ask(int (*question)(const char *), PyObject *word); /* None, or the words of the call that failed */

extern PyMethodDef device_methods[]; /* module_device.c */

#endif
