// The products of products.h on torch's tensors, in torch's threads; and which tensors they can be run on.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <initializer_list>

#include "products.h"

namespace lorakit {

using at::Tensor;

// Multiplications that are worth waking a thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 20;
// Numbers in and out from which other threads of Python should not have to wait.
constexpr int64_t WORTH_THE_INTERPRETER = 1 << 15;
// Entries of a factor, half a megabyte, from which torch's matrix products are as good or better for more tokens than
// that: they move such a factor through the caches more cleverly.
constexpr int64_t LARGE_FACTOR = 1 << 17;
// For so few tokens it is not the work but the reading of the factors that takes the time, and from so many entries of
// them it is worth a thread. Rows of a factor that one thread takes at least: they are read side by side.
constexpr int64_t FEW_TOKENS = 8;
constexpr int64_t FACTORS_WORTH_A_THREAD = 1 << 14;
constexpr int64_t ROWS_AT_LEAST = 4;

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

inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
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

// Call `body(begin, end)` for parts of 0 to `count`, one for each of torch's threads, each a multiple of `least`.
template <class Body>
void in_parts(int64_t count, int64_t least, const Body& body) {
  const int64_t units = (count + least - 1) / least;
  const auto part = [&](int64_t begin, int64_t end) { body(begin * least, std::min(count, end * least)); };
  if (units < 2)
    part(0, units);
  else
    at::parallel_for(0, units, 1, part);
}

// How far apart the rows of y lie in memory, where that is the same everywhere: a whole tensor, or some of the last
// dimension of one. Else 0.
inline int64_t row_step(const Tensor& y) {
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
inline void pass_through(const Tensor& x, const Rows& from, float scale, float* h, const Rows* onto, const Tensor& y,
                         bool add) {
  const int64_t r = from.r, n = from.n, out = onto ? onto->n : 0, step = onto ? row_step(y) : 0, tokens = x.numel() / n;
  const auto shorten = [&](int64_t token, int64_t some, int64_t begin, int64_t end) {
    with_data(x, [&](const auto* p) { project(p + token * n, from.first, some, n, r, begin, end, scale, h + token * r); });
  };
  const auto widen = [&](int64_t token, int64_t some, int64_t begin, int64_t end) {
    with_data(y, [&](auto* p) {
      expand(h + token * r, r, onto->first, some, out, r, begin, end, add, p + token * step, step);
    });
  };
  if (tokens <= FEW_TOKENS && r * (n + out) >= FACTORS_WORTH_A_THREAD) {
    // What takes the time is to read the factors: each thread reads some of their rows, then some of their columns.
    in_parts(r, ROWS_AT_LEAST, [&](int64_t begin, int64_t end) { shorten(0, tokens, begin, end); });
    if (onto)
      in_parts(out, COLUMNS_AT_ONCE, [&](int64_t begin, int64_t end) { widen(0, tokens, begin, end); });
    return;
  }
  share(tokens, r * (n + out), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += TOKENS_AT_ONCE) {
      const int64_t some = std::min(TOKENS_AT_ONCE, end - t);
      shorten(t, some, 0, r);
      if (onto) widen(t, some, 0, out);
    }
  });
}

// hᵀ x, (r, n).
inline Tensor collected(const Tensor& h, const Tensor& x) {
  const int64_t tokens = h.size(0), r = h.size(1), n = x.size(-1);
  const Tensor result = empty({r, n});
  const int64_t blocks = (n + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
  share(blocks, r * tokens * COLUMNS_AT_ONCE, [&](int64_t begin, int64_t end) {
    with_data(x, [&](const auto* p) {
      collect(data<float>(h), r, p, tokens, n, r, begin * COLUMNS_AT_ONCE, std::min(n, end * COLUMNS_AT_ONCE), false,
              data<float>(result));
    });
  });
  return result;
}

// Whether a matrix or its transpose lies in memory without gaps: what `Rows::of_transposed` takes.
inline bool lies_one_way_or_the_other(const Tensor& B) {
  return B.is_contiguous() || (B.stride(0) == 1 && B.stride(1) == B.size(0));
}

// ---- what is taken -----------------------------------------------------------------------------------------------
inline bool has_tangent(const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

// Dense tensors on the CPU, and nobody who watches or rewrites the operations of torch: no tracing, no torch.func, no
// forward mode, no dispatch mode, no subclass. Autocast may watch: the sums are in float32 whatever it wants.
inline bool plain(std::initializer_list<const Tensor*> tensors) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet known({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                                       DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  const auto here = c10::impl::tls_local_dispatch_key_set();
  c10::DispatchKeySet keys = here.included_;
  for (const Tensor* t : tensors) keys = keys | t->key_set();
  if (!known.has_all(keys - here.excluded_)) return false;
  for (const Tensor* t : tensors)
    if (!t->device().is_cpu() || has_tangent(*t)) return false;
  return true;
}


}  // namespace lorakit
