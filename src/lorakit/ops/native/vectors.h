// Vectors as wide as the processor has, and what the loops of this folder do with them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "products.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace lorakit {

// One vector register of float32. 32 registers hold larger tiles of sums than 16 do.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr bool MANY_REGISTERS = true;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr bool MANY_REGISTERS = false;
#elif defined(__aarch64__)
constexpr int WIDTH = 4;
constexpr bool MANY_REGISTERS = true;
#else
constexpr int WIDTH = 4;
constexpr bool MANY_REGISTERS = false;
#endif

// The sums of a tile only stay in registers when the tile is part of the loop around it.
#define INLINE [[gnu::always_inline]] inline

using Vector = float __attribute__((vector_size(4 * WIDTH)));
using Bits = uint32_t __attribute__((vector_size(4 * WIDTH)));
using Whole = int32_t __attribute__((vector_size(4 * WIDTH)));
using Halves = uint16_t __attribute__((vector_size(2 * WIDTH)));

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vector load(const bfloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  return reinterpret_cast<Vector>(bits);
}

#if defined(__AVX512F__)
inline Vector load(const float16* p) {
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#elif defined(__AVX__) && defined(__F16C__)
inline Vector load(const float16* p) {
  return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#else
// The exponent is raised by 112 as a float32 does it: a product with 2 to the power of 112 takes the numbers below the
// normal ones along. Infinities and NaN keep the largest exponent.
inline Vector load(const float16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits);
  const Bits shifted = (bits & 0x7fff) << 13;
  const Vector raised = reinterpret_cast<Vector>(shifted) * 0x1p112f;
  const Bits endless = reinterpret_cast<Bits>(shifted >= (0x7c00u << 13));
  const Bits sign = (bits & 0x8000) << 16;
  return reinterpret_cast<Vector>((reinterpret_cast<Bits>(raised) | (endless & 0x7f800000)) | sign);
}
#endif

inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest, ties to even, as torch does; a NaN stays one.
inline void store(bfloat16* p, Vector v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits nan = reinterpret_cast<Bits>(v != v);  // all ones where it holds
  const Halves halves = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Halves);
  std::memcpy(p, &halves, sizeof halves);
}

// The first `count` entries, the others zero; all of them where PART is false.
template <bool PART, class T>
inline Vector load(const T* p, int64_t count) {
  if constexpr (!PART) return load(p);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
#endif
  T entries[WIDTH] = {};
  std::memcpy(entries, p, count * sizeof(T));
  return load(entries);
}

template <bool PART, class T>
inline void store(T* p, Vector v, int64_t count) {
  if constexpr (!PART) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
#endif
  T entries[WIDTH];
  store(entries, v);
  std::memcpy(p, entries, count * sizeof(T));
}

// Four sums whose sum is that of all entries: halves are added until four are left.
using Four = float __attribute__((vector_size(16)));
inline Four in_four(Four v) { return v; }

template <class Half, class Whole>
INLINE Half sum_of_halves(Whole v) {
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  return halves[0] + halves[1];
}

#if defined(__AVX__)
using Eight = float __attribute__((vector_size(32)));
inline Four in_four(Eight v) { return sum_of_halves<Four>(v); }
#endif
#if defined(__AVX512F__)
inline Four in_four(Vector v) { return in_four(sum_of_halves<Eight>(v)); }
#endif

// The sum of the entries of each of COLUMNS vectors; four at once cost little more than one.
template <int COLUMNS>
INLINE void totals(const Vector* vectors, float* sums) {
  Four v[4] = {};
  for (int j = 0; j < COLUMNS; ++j) v[j] = in_four(vectors[j]);
  using Places = int32_t __attribute__((vector_size(16)));
  const auto both = [](Four a, Four b) {
    return __builtin_shuffle(a, b, Places{0, 4, 1, 5}) + __builtin_shuffle(a, b, Places{2, 6, 3, 7});
  };
  const Four a = both(v[0], v[1]), b = both(v[2], v[3]);
  const Four all = __builtin_shuffle(a, b, Places{0, 1, 4, 5}) + __builtin_shuffle(a, b, Places{2, 3, 6, 7});
  std::memcpy(sums, &all, COLUMNS * sizeof(float));
}

// A square of WIDTH vectors, mirrored at its diagonal: in each step the squares of HALF entries beside it change places.
template <int HALF = WIDTH / 2>
INLINE void mirror(Vector (&v)[WIDTH]) {
  Whole upper, lower;
  for (int lane = 0; lane < WIDTH; ++lane) {
    upper[lane] = lane & HALF ? WIDTH + lane - HALF : lane;
    lower[lane] = lane & HALF ? WIDTH + lane : lane + HALF;
  }
  for (int i = 0; i < WIDTH; ++i)
    if (!(i & HALF)) {
      const Vector a = v[i], b = v[i + HALF];
      v[i] = __builtin_shuffle(a, b, upper);
      v[i + HALF] = __builtin_shuffle(a, b, lower);
    }
  if constexpr (HALF > 1) mirror<HALF / 2>(v);
}

template <int ROWS, int COLUMNS>
INLINE void clear(Vector (&sums)[ROWS][COLUMNS]) {
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) sums[i][j] = Vector{};
}

// Call `body` with the compile-time constant that equals `count`, which is 1 to MOST.
template <int MOST, class Body>
inline void with_constant(int64_t count, const Body& body) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_constant<MOST - 1>(count, body);
  }
  body(std::integral_constant<int, MOST>());
}

}  // namespace lorakit
