// `add_low_rank` for torch: which tensors it takes, how the work is shared between torch's threads, and its derivative.
//
// One Python function, `add_low_rank(y, x, A, B, scale)`: it returns `y` after `y += scale * x Aᵀ Bᵀ`, or None for
// whatever it does not take, which is then left to the operations of torch. It is a function of Python's C interface
// and not an operator of torch's dispatcher, which would cost as much as the work itself does for one token.

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <optional>
#include <vector>

#include "layer.h"
#include "lookup.h"
#include "nf4.h"
#include "on_tensors.h"

namespace {

using namespace lorakit;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// y += scale * x Aᵀ Bᵀ, and h = scale * x Aᵀ, (tokens, r).
void add_product(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale, float* h) {
  const Rows onto = Rows::of_transposed(B);
  pass_through(x, Rows::of(A), static_cast<float>(scale), h, &onto, y, true);
}

int64_t tokens_of(const Tensor& x) { return x.numel() / x.size(-1); }

// Short rows of so many numbers in all are made on the stack.
constexpr int64_t ON_THE_STACK = 256;
// One token's short row lies in its node, if it is no longer than this: a tensor of it costs half a microsecond of thirty.
constexpr int64_t IN_THE_NODE = 64;

bool lies_in_the_node(int64_t tokens, int64_t r) { return tokens == 1 && r <= IN_THE_NODE; }

// ---- the derivative ----------------------------------------------------------------------------------------------
// Keeps x, the factors and h = scale * x Aᵀ. With G = dL/dy:
// dB = Gᵀ h, dh = scale * G B, dA = dhᵀ x, dx = dh A, dy = G.
// Where A is frozen x is not kept; the caller sees to it that then x requires no gradient either.
//
// A node of autograd's own kind: torch::autograd::Function would take three times as long to set up.
struct AddLowRank final : torch::autograd::Node {
  SavedVariable x, A, B, h;
  double scale = 1;
  float row[IN_THE_NODE];  // h of a single token

  AddLowRank() {}  // which leaves `row` as it is

  std::string name() const override { return "AddLowRank"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&x, &A, &B, &h}) saved->reset_data();
  }

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& G = gradients[0];
    if (!G.defined()) return variable_list(4);
    // Does somebody differentiate the backward pass itself?
    return at::GradMode::is_enabled() ? differentiable(G) : quick(G);
  }

 private:
  bool needs(int input) { return task_should_compute_output(input); }

  Tensor short_rows(int64_t tokens, int64_t r) {
    if (!lies_in_the_node(tokens, r)) return h.unpack();
    const Tensor rows = empty({1, r});
    std::copy_n(row, r, data<float>(rows));
    return rows;
  }

  variable_list quick(const Tensor& gradient) {
    const Tensor G = gradient.contiguous();
    // Each is unpacked once: under activation checkpointing what was saved can be fetched no second time.
    const Tensor B = this->B.unpack();
    Tensor dx, dA, dB;
    if (needs(3)) dB = collected(short_rows(tokens_of(G), B.size(1)), G).t().to(B.scalar_type());
    if (needs(1) || needs(2)) {
      const Tensor x = this->x.unpack(), A = this->A.unpack(), dh = empty({tokens_of(G), A.size(0)});
      const Rows onto = Rows::of(A);
      if (needs(1)) dx = empty(x.sizes(), x.scalar_type());
      pass_through(G, Rows::of_transposed(B), static_cast<float>(scale), data<float>(dh),
                   needs(1) ? &onto : nullptr, dx, false);
      if (needs(2)) dA = collected(dh, x).to(A.scalar_type());
    }
    return {needs(0) ? gradient : Tensor(), dx, dA, dB};
  }

  // In operations of torch, and with h as a function of x and A.
  variable_list differentiable(const Tensor& gradient) {
    const auto wide = [](const Tensor& t) { return t.to(at::kFloat); };
    const Tensor x = this->x.unpack(), A = this->A.unpack(), B = this->B.unpack();
    const Tensor G = wide(gradient).reshape({-1, gradient.size(-1)});
    const Tensor rows = x.defined() ? wide(x).reshape({-1, x.size(-1)}) : Tensor();
    Tensor dx, dA, dB;
    if (needs(3)) {
      const Tensor again = x.defined() ? rows.mm(wide(A).t()).mul(scale) : short_rows(G.size(0), B.size(1));
      dB = G.t().mm(again).to(B.scalar_type());
    }
    if (needs(1) || needs(2)) {
      const Tensor dh = G.mm(wide(B)).mul(scale);
      if (needs(1)) dx = dh.mm(wide(A)).to(x.scalar_type()).view_as(x);
      if (needs(2)) dA = dh.t().mm(rows).to(A.scalar_type());
    }
    return {needs(0) ? gradient : Tensor(), dx, dA, dB};
  }
};

void add_recorded(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale) {
  torch::autograd::check_inplace(y, true);
  const auto node = c10::make_intrusive<AddLowRank>();
  node->set_next_edges(torch::autograd::collect_next_edges(y, x, A, B));
  const bool in_node = lies_in_the_node(tokens_of(x), A.size(0));
  const Tensor h = in_node ? Tensor() : empty({tokens_of(x), A.size(0)});
  {
    const at::NoGradGuard unrecorded;
    add_product(y, x, A, B, scale, in_node ? node->row : data<float>(h));
  }
  torch::autograd::increment_version(y);
  if (A.requires_grad()) node->x = SavedVariable(x, false);
  node->A = SavedVariable(A, false);
  node->B = SavedVariable(B, false);
  if (!in_node) node->h = SavedVariable(h, false);
  node->scale = scale;
  torch::autograd::rebase_history(y, node);
}

void add_unrecorded(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale) {
  torch::autograd::increment_version(y);
  const int64_t count = tokens_of(x) * A.size(0);
  float few[ON_THE_STACK];
  std::vector<float> many(count <= ON_THE_STACK ? 0 : count);
  add_product(y, x, A, B, scale, many.empty() ? few : many.data());
}

// ---- what is taken -----------------------------------------------------------------------------------------------
bool float_or_bfloat16(const Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16; }

bool sizes_fit(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B) {
  const int64_t dim = x.dim();
  return dim > 0 && y.dim() == dim && A.dim() == 2 && B.dim() == 2 && A.size(0) > 0 && x.numel() > 0 &&
         x.size(-1) == A.size(1) && y.size(-1) == B.size(0) && B.size(1) == A.size(0) && y.numel() > 0 &&
         x.sizes().slice(0, dim - 1) == y.sizes().slice(0, dim - 1);
}

bool better_left_to_torch(const Tensor& x, const Tensor& A, const Tensor& B) {
  return std::max(A.numel(), B.numel()) >= LARGE_FACTOR && tokens_of(x) > TOKENS_AT_ONCE;
}

bool taken(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B) {
  return plain({&y, &x, &A, &B}) && float_or_bfloat16(y) && float_or_bfloat16(x) && float_or_bfloat16(A) &&
         float_or_bfloat16(B) && sizes_fit(y, x, A, B) && row_step(y) > 0 && x.is_contiguous() &&
         A.is_contiguous() && lies_one_way_or_the_other(B) &&
         !better_left_to_torch(x, A, B);
}

// ---- the Python function -----------------------------------------------------------------------------------------
PyObject* add_low_rank(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "add_low_rank takes y, x, A, B and scale");
    return nullptr;
  }
  const double scale = PyFloat_AsDouble(arguments[4]);
  if (scale == -1 && PyErr_Occurred()) return nullptr;
  return added_product(arguments[0], arguments[1], arguments[2], arguments[3], scale);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"add_low_rank", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(add_low_rank)),
                          METH_FASTCALL, "y += scale * x A^T B^T in place; None for what is not taken."},
                         {"add_lookup", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(add_lookup)),
                          METH_FASTCALL, "The same for rows of A^T that are looked up; None for what is not taken."},
                         {"add_in_layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(add_in_layer)),
                          METH_FASTCALL, "The same for a layer as its hook calls it; None for what is not usual."},
                         {"decode_nf4", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(decode_nf4)),
                          METH_FASTCALL, "Write the values of NF4 codes; None for what is not taken."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "lorakit_low_rank", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

namespace lorakit {

PyObject* added_product(PyObject* onto, PyObject* input, PyObject* down, PyObject* up, double scale) {
  for (PyObject* t : {onto, input, down, up})
    if (!THPVariable_CheckExact(t)) Py_RETURN_NONE;
  const Tensor &y = THPVariable_Unpack(onto), &x = THPVariable_Unpack(input), &A = THPVariable_Unpack(down),
               &B = THPVariable_Unpack(up);
  if (!taken(y, x, A, B)) Py_RETURN_NONE;
  const bool recorded = at::GradMode::is_enabled() &&
                        (y.requires_grad() || x.requires_grad() || A.requires_grad() || B.requires_grad());
  // With A frozen, two operations of torch keep less: only `x Aᵀ` and not `x`.
  if (recorded && x.requires_grad() && !A.requires_grad()) Py_RETURN_NONE;
  {
    // Not for a few tokens: giving the interpreter back and asking for it again would take longer than the work.
    const bool long_enough = x.numel() + y.numel() >= WORTH_THE_INTERPRETER;
    std::optional<pybind11::gil_scoped_release> others_may_run;
    if (long_enough) others_may_run.emplace();
    if (recorded)
      add_recorded(y, x, A, B, scale);
    else
      add_unrecorded(y, x, A, B, scale);
  }
  Py_INCREF(onto);
  return onto;
}

}  // namespace lorakit

PyMODINIT_FUNC PyInit_lorakit_low_rank() { return PyModule_Create(&module); }
