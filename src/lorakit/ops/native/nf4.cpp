// `decode_nf4` for torch: the values of NF4 codes, to the bit those of the plain operations in lorakit/ops/nf4.py.
//
// One Python function, `decode_nf4(codes, absmax, out, first, block)`: it returns `out`, into which it has written the
// numbers from the `first` on, or None for whatever it does not take. A number is its level times the absmax of its
// block, one multiplication in float32; bfloat16 is rounded from that once.

#include "nf4.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define SIXTEEN_AT_ONCE
#endif

namespace {

using at::Tensor;

// Numbers that are worth waking a thread for, and from which other threads of Python should not have to wait.
constexpr int64_t WORTH_A_THREAD = 1 << 16;
constexpr int64_t WORTH_THE_INTERPRETER = 1 << 15;

constexpr float LEVELS[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

void store(float* p, float value) { *p = value; }

// The upper half of the float32, to nearest, ties to even. A NaN is kept from being rounded up to an infinity or zero.
void store(uint16_t* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *p = std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#ifdef SIXTEEN_AT_ONCE
void store(float* p, __m512 values) { _mm512_storeu_ps(p, values); }

void store(uint16_t* p, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i upper = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
}
#endif

// `count` numbers of one block.
template <class T>
void decode_block(const uint8_t* codes, float absmax, T* out, int64_t count) {
  int64_t i = 0;
#ifdef SIXTEEN_AT_ONCE
  // All 16 levels lie in one register, so that looking 16 of them up is one permutation.
  const __m512 levels = _mm512_loadu_ps(LEVELS), scale = _mm512_set1_ps(absmax);
  const __m128i nibble = _mm_set1_epi8(15);
  for (; i + 32 <= count; i += 32) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
    const __m128i first = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble), second = _mm_and_si128(pairs, nibble);
    const __m512i low = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));
    const __m512i high = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(first, second));
    store(out + i, _mm512_mul_ps(_mm512_permutexvar_ps(low, levels), scale));
    store(out + i + 16, _mm512_mul_ps(_mm512_permutexvar_ps(high, levels), scale));
  }
#endif
  for (; i + 1 < count; i += 2) {
    store(out + i, LEVELS[codes[i / 2] >> 4] * absmax);
    store(out + i + 1, LEVELS[codes[i / 2] & 15] * absmax);
  }
  if (i < count) store(out + i, LEVELS[codes[i / 2] >> 4] * absmax);
}

// `n` numbers from the start of a block on.
template <class T>
void decode(const uint8_t* codes, const float* absmax, T* out, int64_t n, int64_t block) {
  const int64_t blocks = (n + block - 1) / block;
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      decode_block(codes + b * block / 2, absmax[b], out + b * block, std::min(block, n - b * block));
  };
  const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / block);
  if (blocks <= grain)
    some(0, blocks);
  else
    at::parallel_for(0, blocks, grain, some);
}

// Dense tensors on the CPU, and nobody who watches or rewrites the operations of torch.
bool plain(const Tensor& codes, const Tensor& absmax, const Tensor& out) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet known({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                                       DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  const auto here = c10::impl::tls_local_dispatch_key_set();
  const auto keys = (codes.key_set() | absmax.key_set() | out.key_set() | here.included_) - here.excluded_;
  return known.has_all(keys) && codes.device().is_cpu() && absmax.device().is_cpu() && out.device().is_cpu();
}

bool taken(const Tensor& codes, const Tensor& absmax, const Tensor& out, int64_t first, int64_t block) {
  if (!plain(codes, absmax, out)) return false;
  if (codes.scalar_type() != at::kByte || absmax.scalar_type() != at::kFloat) return false;
  if (out.scalar_type() != at::kFloat && out.scalar_type() != at::kBFloat16) return false;
  if (!codes.is_contiguous() || !absmax.is_contiguous() || !out.is_contiguous()) return false;
  // A block starts with a whole byte, and what is read must be there.
  if (block < 2 || block % 2 || first < 0 || first % block) return false;
  const int64_t end = first + out.numel();
  return (end + 1) / 2 <= codes.numel() && (end + block - 1) / block <= absmax.numel();
}

}  // namespace

PyObject* decode_nf4(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "decode_nf4 takes codes, absmax, out, first and block");
    return nullptr;
  }
  for (int i = 0; i < 3; ++i)
    if (!THPVariable_CheckExact(arguments[i])) Py_RETURN_NONE;
  const int64_t first = PyLong_AsLongLong(arguments[3]), block = PyLong_AsLongLong(arguments[4]);
  if (PyErr_Occurred()) return nullptr;
  const Tensor &codes = THPVariable_Unpack(arguments[0]), &absmax = THPVariable_Unpack(arguments[1]),
               &out = THPVariable_Unpack(arguments[2]);
  if (!taken(codes, absmax, out, first, block)) Py_RETURN_NONE;
  {
    const int64_t n = out.numel();
    std::optional<pybind11::gil_scoped_release> others_may_run;
    if (n >= WORTH_THE_INTERPRETER) others_may_run.emplace();
    const uint8_t* c = static_cast<const uint8_t*>(codes.data_ptr()) + first / 2;
    const float* a = static_cast<const float*>(absmax.data_ptr()) + first / block;
    if (out.scalar_type() == at::kFloat)
      decode(c, a, static_cast<float*>(out.data_ptr()), n, block);
    else
      decode(c, a, static_cast<uint16_t*>(out.data_ptr()), n, block);
  }
  Py_INCREF(arguments[2]);
  return arguments[2];
  END_HANDLE_TH_ERRORS
}
