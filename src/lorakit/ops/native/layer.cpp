// `add_in_layer(layer, x, y)`: what the hook of an adapted layer mostly does, without Python's functions between.
//
// The usual case is one adapter that acts outside any `use` on a layer that nobody else watches, and does nothing but add its
// product. Whatever differs is answered with None, and the hook goes its own way (lorakit/attach/slot.py, whose names are
// those that are read here). A layer's weight has emptied the caches when its hook runs, and each function of Python takes a
// microsecond to come back.

#include "layer.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>

namespace {

PyObject* name_of(const char* word) {
  PyObject* const name = PyUnicode_InternFromString(word);
  if (name == nullptr) throw python_error();
  return name;
}

struct Names {
  PyObject *forward = name_of("forward"), *hooks = name_of("_forward_hooks"), *modules = name_of("_modules"),
           *parameters = name_of("_parameters"), *home = name_of("lorakit"), *routing = name_of("routing"),
           *ran = name_of("ran"), *training = name_of("training"), *open_scopes = name_of("open_scopes"),
           *ran_scoped = name_of("ran_scoped_with_grad"), *resting = name_of("resting"), *only = name_of("only"),
           *direct = name_of("direct_scales"), *A = name_of("lora_A"), *B = name_of("lora_B");
};

// The hooks of all layers, which torch keeps in one dictionary for as long as it lives.
PyObject* hooks_of_all() {
  THPObjectPtr module(PyImport_ImportModule("torch.nn.modules.module"));
  PyObject* const hooks = module ? PyObject_GetAttrString(module, "_global_forward_hooks") : nullptr;
  if (hooks == nullptr) throw python_error();
  return hooks;
}

// The dictionary with an object's attributes: to look into it is quicker than to ask a module, which asks its class first.
THPObjectPtr facts_of(PyObject* object) {
  THPObjectPtr facts(object == nullptr ? nullptr : PyObject_GenericGetDict(object, nullptr));
  if (!facts) PyErr_Clear();
  return facts;
}

// Null where there is none.
PyObject* entry(PyObject* dictionary, PyObject* key) {
  return dictionary != nullptr && key != nullptr && PyDict_Check(dictionary) ? PyDict_GetItem(dictionary, key) : nullptr;
}

bool holds(PyObject* dictionary, Py_ssize_t count) {
  return dictionary != nullptr && PyDict_Check(dictionary) && PyDict_Size(dictionary) == count;
}

// The only value of a dictionary that has one.
PyObject* only_value(PyObject* dictionary) {
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t place = 0;
  return holds(dictionary, 1) && PyDict_Next(dictionary, &place, &key, &value) ? value : nullptr;
}

struct Change {
  THPObjectPtr A, B;
  double scale = 0;
};

// The product that is all that happens to a layer's output; false where anything else might.
bool found(PyObject* layer, Change& change) {
  static const Names names;
  static PyObject* const for_all = hooks_of_all();
  THPObjectPtr own = facts_of(layer);
  // Nobody else has seen the output, or is yet to see what comes of it.
  if (!holds(for_all, 0) || !holds(entry(own, names.hooks), 1) || entry(own, names.forward) != nullptr) return false;
  THPObjectPtr home = facts_of(entry(entry(own, names.modules), names.home));
  THPObjectPtr slot = facts_of(only_value(entry(home, names.modules)));
  THPObjectPtr routing = facts_of(entry(slot, names.routing));
  if (entry(slot, names.ran) != Py_True || entry(routing, names.ran_scoped) != Py_False) return false;
  PyObject* const open_scopes = entry(routing, names.open_scopes);
  if (open_scopes == nullptr || PyObject_IsTrue(open_scopes) != 0) return false;
  THPObjectPtr resting = facts_of(entry(routing, names.resting));
  THPObjectPtr adapter = facts_of(entry(entry(slot, names.modules), entry(resting, names.only)));
  PyObject *const scales = entry(adapter, names.direct), *const parameters = entry(adapter, names.parameters);
  if (scales == nullptr || !PyTuple_Check(scales) || PyTuple_GET_SIZE(scales) != 2) return false;
  PyObject* const scale = PyTuple_GET_ITEM(scales, entry(slot, names.training) == Py_True);
  PyObject *const A = entry(parameters, names.A), *const B = entry(parameters, names.B);
  if (!PyFloat_Check(scale) || A == nullptr || B == nullptr) return false;
  change.scale = PyFloat_AS_DOUBLE(scale);
  Py_INCREF(A);
  Py_INCREF(B);
  change.A = A;
  change.B = B;
  return true;
}

}  // namespace

PyObject* add_in_layer(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "add_in_layer takes a layer, its input and its output");
    return nullptr;
  }
  Change change;
  if (!found(arguments[0], change)) Py_RETURN_NONE;
  return lorakit::added_product(arguments[2], arguments[1], change.A, change.B, change.scale);
  END_HANDLE_TH_ERRORS
}
