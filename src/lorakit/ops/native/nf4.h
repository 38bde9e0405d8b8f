// The Python function `decode_nf4` of nf4.cpp, for the module's list of methods.
#pragma once

#include <torch/csrc/python_headers.h>

PyObject* decode_nf4(PyObject*, PyObject* const* arguments, Py_ssize_t count);
