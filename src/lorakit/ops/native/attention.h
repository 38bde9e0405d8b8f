// Attention of a few rows of queries at a time, whose scores are kept whole.
#pragma once

#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace lorakit {

constexpr int64_t TILE_COLUMNS = TILE_BLOCKS * WIDTH;
// Entries of a head at most; a head is made of whole vectors.
constexpr int64_t MOST_HEAD = 512;

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Turn the two halves of a head against each other, as Llama does.
inline void rotate(float* head, const float* cos, const float* sin, int64_t n, float scale) {
  const int64_t half = n / 2;
  for (int64_t k = 0; k < half; ++k) {
    const float a = head[k], b = head[k + half];
    head[k] = scale * (a * cos[k] - b * sin[k]);
    head[k + half] = scale * (b * cos[k + half] + a * sin[k + half]);
  }
}

// The derivative of `rotate`: of what goes out to what comes in.
inline void rotate_back(float* head, const float* cos, const float* sin, int64_t n, float scale) {
  const int64_t half = n / 2;
  for (int64_t k = 0; k < half; ++k) {
    const float a = head[k], b = head[k + half];
    head[k] = scale * (a * cos[k] + b * sin[k + half]);
    head[k + half] = scale * (b * cos[k + half] - a * sin[k]);
  }
}

// Of `n` entries, whole vectors of them: too few to be worth a call.
INLINE void copy_head(const float* from, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += WIDTH) store(to + k, load(from + k));
}

// Put a row where it belongs among blocks of WIDTH rows, each block (n, WIDTH).
inline void put_in_block(const float* row, int64_t n, int64_t number, float* blocks) {
  float* to = blocks + number / WIDTH * WIDTH * n + number % WIDTH;
  for (int64_t j = 0; j < n; ++j) to[j * WIDTH] = row[j];
}

// scores[i, j] = queries[i] . keys[j] for ROWS rows and `count` keys in blocks, of which the last is filled up.
template <int ROWS>
void score(const float* queries, const float* keys, int64_t count, int64_t n, float* scores, int64_t step) {
  const int64_t real = padded(count, WIDTH) / WIDTH;
  for (int i = 0; i < ROWS; ++i) std::fill_n(scores + i * step, real * WIDTH, 0.f);
  for (int64_t b = 0; b < real; b += 2) {
    const float* two[2] = {keys + b * WIDTH * n, keys + (b + 1) * WIDTH * n};
    if (b + 1 < real)
      accumulate<ROWS, 2>(queries, n, two, WIDTH, n, scores + b * WIDTH, step);
    else
      accumulate<ROWS, 1>(queries, n, two, WIDTH, n, scores + b * WIDTH, step);
  }
}

// Of `count` entries, whole vectors of them. A NaN that is not the first is passed over.
inline float largest(const float* x, int64_t count) {
  Vector top = load(x);
  for (int64_t k = WIDTH; k < count; k += WIDTH) {
    const Vector v = load(x + k);
    top = v > top ? v : top;
  }
  float most = top[0];
  for (int j = 1; j < WIDTH; ++j) most = std::max(most, top[j]);
  return most;
}

struct Softened {
  float largest, total;
};

// weights = e^(scores - the largest), and zero from `count` to `all`; and their sum.
inline Softened soften(float* scores, int64_t count, int64_t all) {
  const int64_t padded_count = padded(count, WIDTH);
  std::fill(scores + count, scores + all, scores[0]);
  const float most = largest(scores, padded_count);
  std::fill(scores + count, scores + all, most);
  Vector sums{};
  for (int64_t k = 0; k < padded_count; k += WIDTH) {
    const Vector e = exponential(load(scores + k) - most);
    store(scores + k, e);
    sums += e;
  }
  const float total = sum_of(sums) - static_cast<float>(padded_count - count);  // e^0 each
  std::fill(scores + count, scores + all, 0.f);
  return {most, total};
}

// Rows that lie `step` entries apart.
struct Spaced {
  const float* first;
  int64_t step;
};

// to[i] = factors[i] * sum over j of weights[i, j] * values[j], for ROWS rows and the first `count` values.
template <int ROWS>
void weigh(const float* weights, int64_t step, Spaced values, int64_t count, int64_t n, const float* factors,
           float* const* to) {
  alignas(64) float sums[ROWS * TILE_COLUMNS];
  for (int64_t c = 0; c < n; c += TILE_COLUMNS) {
    const int64_t width = std::min<int64_t>(TILE_COLUMNS, n - c);
    const float* two[2] = {values.first + c, values.first + c + WIDTH};
    std::fill_n(sums, ROWS * TILE_COLUMNS, 0.f);
    if (width == TILE_COLUMNS)
      accumulate<ROWS, 2>(weights, step, two, values.step, count, sums, TILE_COLUMNS);
    else
      accumulate<ROWS, 1>(weights, step, two, values.step, count, sums, TILE_COLUMNS);
    for (int i = 0; i < ROWS; ++i)
      for (int64_t k = 0; k < width; ++k) to[i][c + k] = sums[i * TILE_COLUMNS + k] * factors[i];
  }
}

// Attention of ROWS rows of queries (the heads that share keys are rows of their own): row i sees `seen[i]` tokens, at most
// `most`. `scores` is scratch. `logs`, if given, gets the logarithm of each row's sum of exponentials.
template <int ROWS>
void attend_tile(const float* queries, const int64_t* seen, int64_t most, const float* keys, Spaced values, int64_t n,
                 float* scores, float* const* to, float* const* logs) {
  const int64_t step = padded(most, TILE_COLUMNS);
  score<ROWS>(queries, keys, most, n, scores, step);
  float per_sum[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    const Softened s = soften(scores + i * step, seen[i], step);
    per_sum[i] = 1 / s.total;
    if (logs != nullptr) *logs[i] = s.largest + std::log(s.total);
  }
  weigh<ROWS>(scores, step, values, most, n, per_sum, to);
}

}  // namespace lorakit
