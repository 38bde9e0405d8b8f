// The product of a layer's adapter, from the layer itself.
#pragma once

#include <torch/csrc/python_headers.h>

namespace lorakit {

// `y += scale * x Aᵀ Bᵀ` for Python's tensors, recorded where gradients are: returns y, or None for what is not taken.
PyObject* added_product(PyObject* y, PyObject* x, PyObject* A, PyObject* B, double scale);

}  // namespace lorakit

// The Python function `add_in_layer` of layer.cpp, for the module's list of methods.
PyObject* add_in_layer(PyObject*, PyObject* const* arguments, Py_ssize_t count);
