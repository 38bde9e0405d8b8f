// Tiles of a matrix product with a weight in blocks, kept in registers while they are summed.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lorakit {

// Rows of a tile, which is two blocks wide.
constexpr int TILE_ROWS = MANY_REGISTERS ? 12 : 6;
constexpr int TILE_BLOCKS = 2;
// Rows of a tile that is one block wide.
constexpr int TALL_ROWS = MANY_REGISTERS ? 28 : 12;
// Rows of a weight that are asked for before they are needed.
constexpr int64_t ROWS_AHEAD = 128;

struct Nothing {
  void operator()(int64_t) const {}
};

// sums[i, j] += X[i] . W_j over n entries of ROWS rows: W_j is (n, WIDTH) with `w_step` between its rows. The rows of `sums` lie
// `sum_step` apart. `meanwhile(k)` is called for each entry. X is (ROWS, n) with `x_step` between its rows or, where it is
// COLUMNAR, (n, ROWS): then one register is enough to find all that a step needs.
template <int ROWS, int BLOCKS, bool COLUMNAR = false, class Meanwhile = Nothing>
inline void accumulate(const float* x, int64_t x_step, const float* const* w, int64_t w_step, int64_t n, float* sums,
                       int64_t sum_step, const Meanwhile& meanwhile = {}) {
  // Unrolled, the sums are registers; a compiler does not unroll so many turns of a loop by itself.
  Vector tile[ROWS][BLOCKS];
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < BLOCKS; ++j) tile[i][j] = load(sums + i * sum_step + j * WIDTH);
  for (int64_t k = 0; k < n; ++k) {
    meanwhile(k);
    Vector b[BLOCKS];
    for (int j = 0; j < BLOCKS; ++j) {
      __builtin_prefetch(w[j] + (k + ROWS_AHEAD) * w_step, 0, 2);
      b[j] = load(w[j] + k * w_step);
    }
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) {
      const float a = COLUMNAR ? x[k * ROWS + i] : x[i * x_step + k];
      for (int j = 0; j < BLOCKS; ++j) tile[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < BLOCKS; ++j) store(sums + i * sum_step + j * WIDTH, tile[i][j]);
}

// Rows of a tile, (rows, n) without gaps, as (n, rows).
inline void to_columns(const float* x, int64_t rows, int64_t n, float* columns) {
  for (int64_t i = 0; i < rows; i += WIDTH) {
    const int64_t some = std::min<int64_t>(WIDTH, rows - i);
    for (int64_t k = 0; k < n; k += WIDTH) {
      const int64_t count = std::min<int64_t>(WIDTH, n - k);
      Vector square[WIDTH] = {};
      for (int j = 0; j < WIDTH; ++j)
        if (j < some) square[j] = load<true>(x + (i + j) * n + k, count);
      mirror(square);
      for (int j = 0; j < WIDTH; ++j)
        if (j < count) store<true>(columns + (k + j) * rows + i, square[j], some);
    }
  }
}

// ---- int8 --------------------------------------------------------------------------------------------------------
// Codes that share a scale, of a weight's row and of what it is multiplied with.
constexpr int64_t CODES_AT_ONCE = 32;
// Rows of a tile: their sums are kept twice, as whole numbers and as float32.
constexpr int CODE_ROWS = MANY_REGISTERS ? 6 : 2;

// sums += the products of four codes of a row (the same for all columns) with four codes of each column. Where the
// processor multiplies unsigned by signed, the columns' codes get 128 more, and `sums` begins with what that adds too much.
#if defined(__AVX512VNNI__)
constexpr int32_t SHIFT = 128;
using Codes = __m512i;
INLINE Codes load_codes(const int8_t* p) {
  Codes codes;
  std::memcpy(&codes, p, sizeof codes);
  return _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
}
INLINE Whole add_fours(Whole sums, int32_t a, Codes b) {
  return reinterpret_cast<Whole>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), b, _mm512_set1_epi32(a)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int32_t SHIFT = 0;
using Codes = __m256i;
INLINE Codes load_codes(const int8_t* p) {
  Codes codes;
  std::memcpy(&codes, p, sizeof codes);
  return codes;
}
INLINE Whole add_fours(Whole sums, int32_t a, Codes b) {
  // |a| * (b with the sign of a): both are at most 127, so two products fit in 16 bits.
  const __m256i row = _mm256_set1_epi32(a);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(b, row));
  return sums + reinterpret_cast<Whole>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
constexpr int32_t SHIFT = 0;
struct Codes {
  int8_t of[4 * WIDTH];
};
INLINE Codes load_codes(const int8_t* p) {
  Codes codes;
  std::memcpy(&codes, p, sizeof codes);
  return codes;
}
INLINE Whole add_fours(Whole sums, int32_t a, const Codes& b) {
  int8_t row[4];
  std::memcpy(row, &a, 4);
  for (int j = 0; j < WIDTH; ++j)
    for (int k = 0; k < 4; ++k) sums[j] += row[k] * b.of[4 * j + k];
  return sums;
}
#endif

// Rows as codes: `n` codes each, a multiple of CODES_AT_ONCE, and for each group of these a scale and the sum.
struct CodeRows {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
  int64_t n;
};

// sums[i, j] = X[i] . W_j: the products of codes are exact, each group of them is scaled and added in float32.
// W_j: codes (n / 4, WIDTH, 4) and scales (n / CODES_AT_ONCE, WIDTH).
// `meanwhile(g)` is called for each group.
template <int ROWS, int BLOCKS, class Meanwhile>
inline void multiply_codes(const CodeRows& x, const int8_t* const* w, const float* const* scales, float* sums,
                           int64_t sum_step, const Meanwhile& meanwhile) {
  const int64_t groups = x.n / CODES_AT_ONCE;
  Vector totals[ROWS][BLOCKS] = {};
  for (int64_t g = 0; g < groups; ++g) {
    meanwhile(g);
    Whole tile[ROWS][BLOCKS];
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < BLOCKS; ++j) tile[i][j] = Whole{} - SHIFT * x.sums[i * groups + g];
    for (int64_t k = g * CODES_AT_ONCE; k < (g + 1) * CODES_AT_ONCE; k += 4) {
      Codes b[BLOCKS];
      for (int j = 0; j < BLOCKS; ++j) b[j] = load_codes(w[j] + k * WIDTH);
      for (int i = 0; i < ROWS; ++i) {
        int32_t a;
        std::memcpy(&a, x.codes + i * x.n + k, 4);
        for (int j = 0; j < BLOCKS; ++j) tile[i][j] = add_fours(tile[i][j], a, b[j]);
      }
    }
    for (int j = 0; j < BLOCKS; ++j) {
      const Vector worth = load(scales[j] + g * WIDTH);
      for (int i = 0; i < ROWS; ++i)
        totals[i][j] += __builtin_convertvector(tile[i][j], Vector) * (x.scales[i * groups + g] * worth);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < BLOCKS; ++j) store(sums + i * sum_step + j * WIDTH, totals[i][j]);
}

// A row of n entries as codes: in each group the largest is 127. The last group is filled up with zeros.
inline void to_codes(const float* x, int64_t n, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t begin = 0; begin < n; begin += CODES_AT_ONCE, ++scales, ++sums) {
    const int64_t count = std::min(CODES_AT_ONCE, n - begin);
    float most = 0;
    for (int64_t k = 0; k < count; ++k) most = std::max(most, std::fabs(x[begin + k]));
    *scales = most / 127;
    const float per = most > 0 ? 127 / most : 0;
    int32_t sum = 0;
    for (int64_t k = 0; k < CODES_AT_ONCE; ++k) {
      const int32_t code = k < count ? static_cast<int32_t>(std::nearbyint(x[begin + k] * per)) : 0;
      codes[begin + k] = static_cast<int8_t>(code);
      sum += code;
    }
    *sums = sum;
  }
}

// ---- functions of each entry -------------------------------------------------------------------------------------
// e to the power of v, to two units in the last place; 0 below -87.
INLINE Vector exponential(Vector v) {
  constexpr float PER_LN2 = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, ROUNDER = 12582912.f;
  const Vector low = Vector{} - 87.f, high = Vector{} + 88.f;
  const auto small = v < low;
  v = small ? low : v;
  v = v > high ? high : v;
  const Vector whole = (v * PER_LN2 + ROUNDER) - ROUNDER;
  const Vector rest = v - whole * LN2_HIGH - whole * LN2_LOW;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.f;
  const Whole power = (__builtin_convertvector(whole, Whole) + 127) << 23;
  return small ? Vector{} : p * reinterpret_cast<Vector>(power);
}

INLINE Vector silu(Vector v) { return v / (1.f + exponential(-v)); }

INLINE Vector gelu_by_tanh(Vector v) {
  const Vector inner = 0.7978845608f * (v + 0.044715f * v * v * v);
  return v / (1.f + exponential(-2.f * inner));
}

// ---- functions of a row ------------------------------------------------------------------------------------------
inline float sum_of(Vector v) {
  float sum;
  totals<1>(&v, &sum);
  return sum;
}

// y = weight * x / sqrt(mean(x²) + epsilon); returns the factor.
inline float normalize(const float* x, const float* weight, int64_t n, double epsilon, float* y) {
  float squares = 0;
  int64_t k = 0;
  Vector sums{};
  for (; k + WIDTH <= n; k += WIDTH) sums += load(x + k) * load(x + k);
  for (int j = 0; j < WIDTH; ++j) squares += sums[j];
  for (; k < n; ++k) squares += x[k] * x[k];
  const float factor = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(n) + epsilon));
  for (k = 0; k < n; ++k) y[k] = x[k] * factor * weight[k];
  return factor;
}

}  // namespace lorakit
