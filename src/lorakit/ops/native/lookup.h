// The low-rank change of an embedding table, as a function of Python.
#pragma once

#include <Python.h>

PyObject* add_lookup(PyObject*, PyObject* const* arguments, Py_ssize_t count);
