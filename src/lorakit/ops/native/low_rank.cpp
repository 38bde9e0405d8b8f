// `add_low_rank` for torch: which tensors it takes, how the work is shared between torch's threads, and its derivative.
//
// One Python function, `add_low_rank(y, x, A, B, scale)`: it returns `y` after `y += scale * x Aᵀ Bᵀ`, or None for
// whatever it does not take, which is then left to the operations of torch. It is a function of Python's C interface
// and not an operator of torch's dispatcher, which would cost as much as the work itself does for one token.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "nf4.h"
#include "products.h"

namespace {

using at::Tensor;
using lorakit::bfloat16;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Multiplications that are worth waking a thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 20;
// Numbers in and out from which other threads of Python should not have to wait.
constexpr int64_t WORTH_THE_INTERPRETER = 1 << 15;
// Tokens whose short rows are made and used before the next ones; a multiple of the tiles in products.cpp.
constexpr int64_t TOKENS_AT_ONCE = 48;
// Entries of a factor, half a megabyte, from which torch's matrix products are as good or better for more tokens than
// that: they move such a factor through the caches more cleverly.
constexpr int64_t LARGE_FACTOR = 1 << 17;
// Columns of a derivative that one thread takes at a time.
constexpr int64_t COLUMNS_AT_ONCE = 64;

// ---- running the products on tensors -----------------------------------------------------------------------------
template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Call `body` with a pointer to the entries, which are float32 or bfloat16.
template <class Body>
void with_data(const Tensor& t, const Body& body) {
  if (t.scalar_type() == at::kFloat)
    body(data<float>(t));
  else
    body(data<bfloat16>(t));
}

Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  return Tensor(at::detail::empty_cpu(sizes, dtype));
}

// A factor as float32 in r rows without gaps: where it lies, or in a copy. The calls of torch that make a copy, and
// even those that find that none is needed, take longer than the work of one token.
class Rows {
 public:
  // Of A, which is (r, n) and contiguous.
  static Rows of(const Tensor& A) {
    return Rows(A, A.size(0), A.size(1), A.scalar_type() == at::kFloat, [&] { return A.to(at::kFloat); });
  }

  // Of B transposed, where B is (n, r) and either it or its transpose is contiguous.
  static Rows of_transposed(const Tensor& B) {
    const bool lies_in_rows = B.scalar_type() == at::kFloat && (B.size(0) == 1 || B.stride(0) == 1) &&
                              (B.size(1) == 1 || B.stride(1) == B.size(0));
    return Rows(B, B.size(1), B.size(0), lies_in_rows, [&] { return B.t().to(at::kFloat).contiguous(); });
  }

  const float* first;
  int64_t r, n;

 private:
  template <class Copy>
  Rows(const Tensor& factor, int64_t r, int64_t n, bool usable, const Copy& copy) : r(r), n(n) {
    if (!usable) copy_ = copy();
    first = data<const float>(usable ? factor : copy_);
  }

  Tensor copy_;
};

// ---- sharing the work --------------------------------------------------------------------------------------------
// Call `body(begin, end)` for parts of 0 to `count`, in torch's threads if that is worth it.
template <class Body>
void share(int64_t count, int64_t work_each, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, work_each));
  if (count <= grain)
    body(0, count);
  else
    at::parallel_for(0, count, grain, body);
}

// How far apart the rows of y lie in memory, where that is the same everywhere: a whole tensor, or some of the last
// dimension of one. Else 0.
int64_t row_step(const Tensor& y) {
  if (y.is_contiguous()) return y.size(-1);
  if (y.dim() < 2 || y.stride(-1) != 1 || y.stride(-2) < y.size(-1)) return 0;
  int64_t step = y.stride(-2) * y.size(-2);
  for (int64_t d = y.dim() - 3; d >= 0; --d) {
    if (y.size(d) != 1 && y.stride(d) != step) return 0;
    step *= y.size(d);
  }
  return y.stride(-2);
}

// The short rows h = scale * x fromᵀ, (tokens, r), and y (+)= h onto, if `onto` is given.
void pass_through(const Tensor& x, const Rows& from, float scale, float* h, const Rows* onto, const Tensor& y,
                  bool add) {
  const int64_t r = from.r, n = from.n, out = onto ? onto->n : 0, step = onto ? row_step(y) : 0;
  share(x.numel() / n, r * (n + out), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += TOKENS_AT_ONCE) {
      const int64_t some = std::min(TOKENS_AT_ONCE, end - t);
      with_data(x, [&](const auto* p) { lorakit::project(p + t * n, from.first, some, n, r, scale, h + t * r); });
      if (onto)
        with_data(y, [&](auto* p) {
          lorakit::expand(h + t * r, onto->first, some, out, r, add, p + t * step, step);
        });
    }
  });
}

// hᵀ x, (r, n).
Tensor collected(const Tensor& h, const Tensor& x) {
  const int64_t tokens = h.size(0), r = h.size(1), n = x.size(-1);
  const Tensor result = empty({r, n});
  const int64_t blocks = (n + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
  share(blocks, r * tokens * COLUMNS_AT_ONCE, [&](int64_t begin, int64_t end) {
    with_data(x, [&](const auto* p) {
      lorakit::collect(data<float>(h), p, tokens, n, r, begin * COLUMNS_AT_ONCE, std::min(n, end * COLUMNS_AT_ONCE),
                       data<float>(result));
    });
  });
  return result;
}

// y += scale * x Aᵀ Bᵀ, and h = scale * x Aᵀ, (tokens, r).
void add_product(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale, float* h) {
  const Rows onto = Rows::of_transposed(B);
  pass_through(x, Rows::of(A), static_cast<float>(scale), h, &onto, y, true);
}

int64_t tokens_of(const Tensor& x) { return x.numel() / x.size(-1); }

// ---- the derivative ----------------------------------------------------------------------------------------------
// Keeps x, the factors and h = scale * x Aᵀ. With G = dL/dy:
// dB = Gᵀ h, dh = scale * G B, dA = dhᵀ x, dx = dh A, dy = G.
// Where A is frozen x is not kept; the caller sees to it that then x requires no gradient either.
//
// A node of autograd's own kind: torch::autograd::Function would take three times as long to set up.
struct AddLowRank final : torch::autograd::Node {
  SavedVariable x, A, B, h;
  double scale = 1;

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

  variable_list quick(const Tensor& gradient) {
    const Tensor G = gradient.contiguous();
    // Each is unpacked once: under activation checkpointing what was saved can be fetched no second time.
    const Tensor B = this->B.unpack();
    Tensor dx, dA, dB;
    if (needs(3)) dB = collected(h.unpack(), G).t().to(B.scalar_type());
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
      const Tensor again = x.defined() ? rows.mm(wide(A).t()).mul(scale) : h.unpack();
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
  const Tensor h = empty({tokens_of(x), A.size(0)});
  {
    const at::NoGradGuard unrecorded;
    add_product(y, x, A, B, scale, data<float>(h));
  }
  torch::autograd::increment_version(y);
  if (A.requires_grad()) node->x = SavedVariable(x, false);
  node->A = SavedVariable(A, false);
  node->B = SavedVariable(B, false);
  node->h = SavedVariable(h, false);
  node->scale = scale;
  torch::autograd::rebase_history(y, node);
}

void add_unrecorded(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale) {
  torch::autograd::increment_version(y);
  const int64_t count = tokens_of(x) * A.size(0);
  float few[256];
  std::vector<float> many(count <= 256 ? 0 : count);
  add_product(y, x, A, B, scale, many.empty() ? few : many.data());
}

// ---- what is taken -----------------------------------------------------------------------------------------------
bool has_tangent(const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

// Dense tensors on the CPU, and nobody who watches or rewrites the operations of torch: no tracing, no torch.func, no
// forward mode, no dispatch mode, no subclass. Autocast may watch: the sums are in float32 whatever it wants.
bool plain(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet known({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                                       DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  const auto here = c10::impl::tls_local_dispatch_key_set();
  const auto keys =
      (y.key_set() | x.key_set() | A.key_set() | B.key_set() | here.included_) - here.excluded_;
  return known.has_all(keys) && y.device().is_cpu() && x.device().is_cpu() && A.device().is_cpu() &&
         B.device().is_cpu() && !has_tangent(y) && !has_tangent(x) && !has_tangent(A) && !has_tangent(B);
}

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
  return plain(y, x, A, B) && float_or_bfloat16(y) && float_or_bfloat16(x) && float_or_bfloat16(A) &&
         float_or_bfloat16(B) && sizes_fit(y, x, A, B) && row_step(y) > 0 && x.is_contiguous() &&
         A.is_contiguous() && (B.is_contiguous() || (B.stride(0) == 1 && B.stride(1) == B.size(0))) &&
         !better_left_to_torch(x, A, B);
}

// ---- the Python function -----------------------------------------------------------------------------------------
PyObject* add_low_rank(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "add_low_rank takes y, x, A, B and scale");
    return nullptr;
  }
  for (int i = 0; i < 4; ++i)
    if (!THPVariable_CheckExact(arguments[i])) Py_RETURN_NONE;
  const double scale = PyFloat_AsDouble(arguments[4]);
  if (scale == -1 && PyErr_Occurred()) return nullptr;
  const Tensor &y = THPVariable_Unpack(arguments[0]), &x = THPVariable_Unpack(arguments[1]),
               &A = THPVariable_Unpack(arguments[2]), &B = THPVariable_Unpack(arguments[3]);
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
  Py_INCREF(arguments[0]);
  return arguments[0];
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"add_low_rank", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(add_low_rank)),
                          METH_FASTCALL, "y += scale * x A^T B^T in place; None for what is not taken."},
                         {"decode_nf4", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(decode_nf4)),
                          METH_FASTCALL, "Write the values of NF4 codes; None for what is not taken."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "lorakit_low_rank", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_lorakit_low_rank() { return PyModule_Create(&module); }
