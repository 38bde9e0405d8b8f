// The loops behind products.h, in vectors as wide as the processor has.

#include "products.h"

#include <algorithm>

#include "vectors.h"

namespace lorakit {
namespace {

// Tiles of sums that stay in registers: DOT_ROWS x DOT_COLUMNS dot products, SUM_ROWS x SUM_VECTORS vectors of sums.
constexpr int DOT_ROWS = MANY_REGISTERS ? 6 : 2;
constexpr int DOT_COLUMNS = 4;
constexpr int FEW_ROWS = 2;
constexpr int SUM_ROWS = MANY_REGISTERS ? 8 : 4;
constexpr int SUM_VECTORS = 2;
// Long rows are worked through in pieces of this length, for all tokens at hand: then the rows of a tile stay in the
// first cache, and a piece of the factor in the second.
constexpr int64_t PIECE = 1024;
// As many rows of X are read for all columns of D before the next ones are.
constexpr int64_t ROWS_AT_ONCE = 64;

// ---- dot products of rows ----------------------------------------------------------------------------------------
// sums[i][j] += X[i] . M[j] over WIDTH entries, or over the first `count` of them.
template <bool PART, int ROWS, int COLUMNS, class M>
INLINE void add_products(Vector (&sums)[ROWS][COLUMNS], const float* x, int64_t x_step, const M* m, int64_t m_step,
                         int64_t count) {
  Vector b[COLUMNS];
  for (int j = 0; j < COLUMNS; ++j) {
    // With few rows it is the reading that takes the time: what the next tile needs is asked for.
    if constexpr (ROWS <= FEW_ROWS) __builtin_prefetch(m + (j + COLUMNS) * m_step);
    b[j] = load<PART>(m + j * m_step, count);
  }
  for (int i = 0; i < ROWS; ++i) {
    const Vector a = load<PART>(x + i * x_step, count);
    for (int j = 0; j < COLUMNS; ++j) sums[i][j] += a * b[j];
  }
}

// H[i, j] (+)= scale * X[i] . M[j] over `n` entries, for ROWS rows of X and COLUMNS rows of M.
template <int ROWS, int COLUMNS, class M>
INLINE void dot_tile(const float* x, int64_t x_step, const M* m, int64_t m_step, int64_t n, float scale, bool add,
                     float* h, int64_t h_step) {
  Vector sums[ROWS][COLUMNS];
  clear(sums);
  int64_t k = 0;
  for (; k + WIDTH <= n; k += WIDTH) add_products<false>(sums, x + k, x_step, m + k, m_step, WIDTH);
  if (k < n) add_products<true>(sums, x + k, x_step, m + k, m_step, n - k);
  for (int i = 0; i < ROWS; ++i) {
    float sum[COLUMNS];
    totals<COLUMNS>(sums[i], sum);
    for (int j = 0; j < COLUMNS; ++j) h[i * h_step + j] = scale * sum[j] + (add ? h[i * h_step + j] : 0.0f);
  }
}

// Rows in float32, for `count` entries of each: where they are, or in a copy. `step` becomes their distance.
inline const float* in_float(const float* x, int64_t, int64_t, int64_t&, float*) { return x; }

inline const float* in_float(const bfloat16* x, int64_t rows, int64_t count, int64_t& step, float* copy) {
  for (int64_t i = 0; i < rows; ++i) {
    int64_t k = 0;
    for (; k + WIDTH <= count; k += WIDTH) store(copy + i * count + k, load(x + i * step + k));
    if (k < count) store<true>(copy + i * count + k, load<true>(x + i * step + k, count - k), count - k);
  }
  step = count;
  return copy;
}

// ---- sums of rows ------------------------------------------------------------------------------------------------
// Y[i] (+)= sum over k of L[i, k] * M[k], for ROWS rows of Y and VECTORS vectors of columns, or where PART holds the
// first `count` columns of one. L[i, k] lies at l[i * l_row + k * l_column].
template <bool PART, int ROWS, int VECTORS, class M, class Y>
INLINE void sum_tile(const float* l, int64_t l_row, int64_t l_column, const M* m, int64_t m_step, int64_t terms,
                     bool add, Y* y, int64_t y_step, int64_t count) {
  Vector sums[ROWS][VECTORS];
  clear(sums);
  for (int64_t k = 0; k < terms; ++k) {
    Vector b[VECTORS];
    for (int v = 0; v < VECTORS; ++v) b[v] = load<PART>(m + k * m_step + v * WIDTH, count);
    for (int i = 0; i < ROWS; ++i) {
      const float a = l[i * l_row + k * l_column];
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += a * b[v];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      Y* const to = y + i * y_step + v * WIDTH;
      store<PART>(to, add ? load<PART>(to, count) + sums[i][v] : sums[i][v], count);
    }
}

// The same for any number of rows, up to SUM_ROWS at a time, and the columns `begin` to `end`.
template <class M, class Y>
inline void sum_rows(const float* l, int64_t l_row, int64_t l_column, const M* m, int64_t m_step, int64_t terms,
                     bool add, Y* y, int64_t y_step, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < rows; i += SUM_ROWS)
    with_constant<SUM_ROWS>(std::min<int64_t>(SUM_ROWS, rows - i), [&](auto some_rows) {
      const float* from = l + i * l_row;
      Y* to = y + i * y_step;
      int64_t o = begin;
      for (; o + SUM_VECTORS * WIDTH <= end; o += SUM_VECTORS * WIDTH)
        sum_tile<false, some_rows, SUM_VECTORS>(from, l_row, l_column, m + o, m_step, terms, add, to + o, y_step, 0);
      for (; o + WIDTH <= end; o += WIDTH)
        sum_tile<false, some_rows, 1>(from, l_row, l_column, m + o, m_step, terms, add, to + o, y_step, 0);
      if (o < end)
        sum_tile<true, some_rows, 1>(from, l_row, l_column, m + o, m_step, terms, add, to + o, y_step, end - o);
    });
}

}  // namespace

// ---- the three products ------------------------------------------------------------------------------------------
template <class X, class M>
void project(const X* x, const M* m, int64_t rows, int64_t n, int64_t h_step, int64_t begin, int64_t end, float scale,
             float* h) {
  alignas(64) float copy[DOT_ROWS * PIECE];
  for (int64_t k = 0; k < n; k += PIECE) {
    const int64_t piece = std::min(PIECE, n - k);
    for (int64_t i = 0; i < rows; i += DOT_ROWS) {
      const int64_t some = std::min<int64_t>(DOT_ROWS, rows - i);
      int64_t step = n;
      const float* from = in_float(x + i * n + k, some, piece, step, copy);
      for (int64_t j = begin; j < end; j += DOT_COLUMNS)
        with_constant<DOT_ROWS>(some, [&](auto some_rows) {
          with_constant<DOT_COLUMNS>(std::min<int64_t>(DOT_COLUMNS, end - j), [&](auto columns) {
            dot_tile<some_rows, columns>(from, step, m + j * n + k, n, piece, scale, k > 0, h + i * h_step + j, h_step);
          });
        });
    }
  }
}

template <class Y>
void expand(const float* h, int64_t h_step, const float* m, int64_t rows, int64_t n, int64_t r, int64_t begin,
            int64_t end, bool add, Y* y, int64_t step) {
  for (int64_t o = begin; o < end; o += PIECE)
    sum_rows(h, h_step, 1, m, n, r, add, y, step, rows, o, std::min(end, o + PIECE));
}

template <class X>
void collect(const float* h, int64_t h_step, const X* x, int64_t rows, int64_t n, int64_t r, int64_t begin, int64_t end,
             bool add, float* d) {
  for (int64_t i = 0; i < rows; i += ROWS_AT_ONCE)
    sum_rows(h + i * h_step, 1, h_step, x + i * n, n, std::min(ROWS_AT_ONCE, rows - i), add || i > 0, d, n, r, begin, end);
}

template void project(const float*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float, float*);
template void project(const bfloat16*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float, float*);
template void project(const float*, const bfloat16*, int64_t, int64_t, int64_t, int64_t, int64_t, float, float*);
template void project(const float*, const float16*, int64_t, int64_t, int64_t, int64_t, int64_t, float, float*);
template void expand(const float*, int64_t, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float*,
                     int64_t);
template void expand(const float*, int64_t, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bfloat16*,
                     int64_t);
template void collect(const float*, int64_t, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float*);
template void collect(const float*, int64_t, const bfloat16*, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                      float*);

}  // namespace lorakit
