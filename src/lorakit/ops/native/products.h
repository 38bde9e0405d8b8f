// The three products of a low-rank change and of its derivatives, as plain loops: nothing here knows torch or threads.
//
// All matrices are row-major, and without gaps but for `Y`, whose rows lie `step` entries apart, and `H`, whose rows lie
// `h_step` apart. `H` (rows x r) holds one short row for each token, `M` (r x n) is a factor: `A` itself, or `B`
// transposed. Sums are kept in float32 whatever `X` and `Y` are. What is computed for one row or column never depends on
// which others are computed with it, nor on how the work is divided.
#pragma once

#include <cstdint>

namespace lorakit {

// Tokens whose short rows are made and used before the next ones; a multiple of the tiles in products.cpp.
constexpr int64_t TOKENS_AT_ONCE = 48;
// Columns of a derivative that one thread takes at a time.
constexpr int64_t COLUMNS_AT_ONCE = 64;

// The upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};
// A number of IEEE's half precision.
struct float16 {
  uint16_t bits;
};

// The columns `begin` to `end` of H = scale * X Mᵀ, for X (rows x n), one of the two in float32.
template <class X, class M>
void project(const X* x, const M* m, int64_t rows, int64_t n, int64_t h_step, int64_t begin, int64_t end, float scale,
             float* h);

// The columns `begin` to `end` of Y = H M, or Y += H M, for Y (rows x n); each entry is rounded once.
template <class Y>
void expand(const float* h, int64_t h_step, const float* m, int64_t rows, int64_t n, int64_t r, int64_t begin,
            int64_t end, bool add, Y* y, int64_t step);

// The columns `begin` to `end` of D = Hᵀ X, or D += Hᵀ X, for X (rows x n) and D (r x n).
template <class X>
void collect(const float* h, int64_t h_step, const X* x, int64_t rows, int64_t n, int64_t r, int64_t begin, int64_t end,
             bool add, float* d);

}  // namespace lorakit
