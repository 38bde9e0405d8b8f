// `add_lookup` for torch: y += scale * Aᵀ[ids] Bᵀ, where the columns of A belong to the entries of a table.
//
// It returns `y`, or None for whatever it does not take, as `add_low_rank` does.

#include "lookup.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdlib>
#include <new>
#include <vector>

#include "on_tensors.h"

namespace {

using namespace lorakit;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// h = scale * Aᵀ[ids], (tokens, r).
void look_up(const Tensor& ids, const Tensor& A, double scale, float* h) {
  const int64_t r = A.size(0), count = ids.numel();
  const auto* id = data<const int64_t>(ids);
  const auto* table = data<const float>(A);
  const float factor = static_cast<float>(scale);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t j = 0; j < r; ++j) h[t * r + j] = factor * table[id[t] * r + j];
}

// y += h Bᵀ.
void add_rows(const Tensor& y, const Tensor& B, const float* h, int64_t tokens) {
  const Rows onto = Rows::of_transposed(B);
  const int64_t step = row_step(y);
  share(tokens, onto.r * onto.n, [&](int64_t begin, int64_t end) {
    expand(h + begin * onto.r, onto.r, onto.first, end - begin, onto.n, onto.r, 0, onto.n, true,
           data<float>(y) + begin * step, step);
  });
}

// Zeros whose memory the system hands out page by page as it is touched: few rows of a table are.
Tensor zeros(int64_t rows, int64_t columns) {
  void* memory = std::calloc(static_cast<size_t>(rows * columns), sizeof(float));
  if (memory == nullptr) throw std::bad_alloc();
  return at::from_blob(memory, {rows, columns}, std::free, at::kFloat);
}

// With G = dL/dy and h as above: dB = Gᵀ h, dh = scale * G B, dA[:, ids] += dhᵀ, dy = G.
struct AddLookup final : torch::autograd::Node {
  SavedVariable ids, A, B, h;
  int64_t vocabulary = 0, padding = -1;
  double scale = 1;

  std::string name() const override { return "AddLookup"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&ids, &A, &B, &h}) saved->reset_data();
  }

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!gradients[0].defined()) return variable_list(3);
    // Does somebody differentiate the backward pass itself?
    return at::GradMode::is_enabled() ? differentiable(gradients[0]) : quick(gradients[0]);
  }

 private:
  variable_list quick(const Tensor& gradient) {
    const Tensor G = gradient.contiguous(), B = this->B.unpack();
    Tensor dA, dB;
    if (task_should_compute_output(2)) dB = collected(h.unpack(), G).t();
    if (task_should_compute_output(1)) dA = scattered(G, B);
    return {task_should_compute_output(0) ? gradient : Tensor(), dA, dB};
  }

  // In operations of torch, and with h as a function of A.
  variable_list differentiable(const Tensor& gradient) {
    const Tensor ids = this->ids.unpack().flatten(), A = this->A.unpack(), B = this->B.unpack();
    const Tensor G = gradient.reshape({-1, gradient.size(-1)});
    Tensor dA, dB;
    if (task_should_compute_output(2)) dB = G.t().mm(A.t().index_select(0, ids).mul(scale));
    if (task_should_compute_output(1)) {
      const Tensor dh = G.mm(B).mul(scale).mul(ids.ne(padding).unsqueeze(-1));
      dA = B.new_zeros({vocabulary, B.size(1)}).index_add(0, ids, dh).t();
    }
    return {task_should_compute_output(0) ? gradient : Tensor(), dA, dB};
  }

  // (r, vocabulary), with the columns side by side in memory as those of A are.
  Tensor scattered(const Tensor& G, const Tensor& B) {
    const Tensor ids = this->ids.unpack();
    const int64_t tokens = ids.numel(), r = B.size(1);
    const Tensor dh = empty({tokens, r}), dA = zeros(vocabulary, r);
    pass_through(G, Rows::of_transposed(B), static_cast<float>(scale), data<float>(dh), nullptr, Tensor(), false);
    const auto* id = data<const int64_t>(ids);
    const auto* from = data<const float>(dh);
    auto* to = data<float>(dA);
    for (int64_t t = 0; t < tokens; ++t) {
      if (id[t] == padding) continue;
      for (int64_t j = 0; j < r; ++j) to[id[t] * r + j] += from[t * r + j];
    }
    return dA.t();
  }
};

bool columns_lie_side_by_side(const Tensor& A) {
  return A.dim() == 2 && A.size(0) > 0 && (A.size(0) == 1 || A.stride(0) == 1) && A.stride(1) == A.size(0);
}

bool all_in_table(const Tensor& ids, int64_t vocabulary) {
  const auto* id = data<const int64_t>(ids);
  return std::all_of(id, id + ids.numel(), [&](int64_t i) { return 0 <= i && i < vocabulary; });
}

bool taken(const Tensor& y, const Tensor& ids, const Tensor& A, const Tensor& B) {
  return plain({&y, &ids, &A, &B}) && y.scalar_type() == at::kFloat && A.scalar_type() == at::kFloat &&
         B.scalar_type() == at::kFloat && ids.scalar_type() == at::kLong && ids.is_contiguous() &&
         columns_lie_side_by_side(A) && B.dim() == 2 && B.size(1) == A.size(0) && y.dim() == ids.dim() + 1 &&
         y.numel() > 0 && y.size(-1) == B.size(0) && y.sizes().slice(0, ids.dim()) == ids.sizes() && row_step(y) > 0 &&
         lies_one_way_or_the_other(B) && all_in_table(ids, A.size(1));
}

}  // namespace

PyObject* add_lookup(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError, "add_lookup takes y, ids, A, B, scale and padding");
    return nullptr;
  }
  for (int i = 0; i < 4; ++i)
    if (!THPVariable_CheckExact(arguments[i])) Py_RETURN_NONE;
  const double scale = PyFloat_AsDouble(arguments[4]);
  const int64_t padding = PyLong_AsLongLong(arguments[5]);
  if (PyErr_Occurred()) return nullptr;
  const Tensor &y = THPVariable_Unpack(arguments[0]), &ids = THPVariable_Unpack(arguments[1]),
               &A = THPVariable_Unpack(arguments[2]), &B = THPVariable_Unpack(arguments[3]);
  if (!taken(y, ids, A, B)) Py_RETURN_NONE;
  const int64_t tokens = ids.numel(), r = A.size(0);
  if (at::GradMode::is_enabled() && (y.requires_grad() || A.requires_grad() || B.requires_grad())) {
    torch::autograd::check_inplace(y, true);
    const auto node = c10::make_intrusive<AddLookup>();
    node->set_next_edges(torch::autograd::collect_next_edges(y, A, B));
    const Tensor h = empty({tokens, r});
    {
      const at::NoGradGuard unrecorded;
      look_up(ids, A, scale, data<float>(h));
      add_rows(y, B, data<float>(h), tokens);
    }
    torch::autograd::increment_version(y);
    node->ids = SavedVariable(ids, false);
    node->A = SavedVariable(A, false);
    node->B = SavedVariable(B, false);
    node->h = SavedVariable(h, false);
    node->vocabulary = A.size(1);
    node->padding = padding;
    node->scale = scale;
    torch::autograd::rebase_history(y, node);
  } else {
    torch::autograd::increment_version(y);
    std::vector<float> h(static_cast<size_t>(tokens * r));
    look_up(ids, A, scale, h.data());
    add_rows(y, B, h.data(), tokens);
  }
  Py_INCREF(arguments[0]);
  return arguments[0];
  END_HANDLE_TH_ERRORS
}
