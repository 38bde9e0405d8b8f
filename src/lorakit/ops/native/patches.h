// What adapters add to the tiles of a product, each to its own rows, straight from the factors as their files have them:
// an adapter takes no memory beside its tensors, and is ready as soon as it has been read.
#pragma once

#include <algorithm>

#include "decoder.h"
#include "team.h"
#include "tiles.h"

namespace lorakit {

// Rows whose short rows are made at a time.
constexpr int64_t SHORT_ROWS = 12;

// The adapters of the rows, at one weight.
struct Segments {
  const Segment* list;
  int64_t count;
  int64_t site;  // which weight

  const Patch* patch(const Segment& s) const { return s.patches == nullptr ? nullptr : s.patches + site; }
};

// Call `body` with a pointer to the entries of a factor.
template <class Body>
INLINE void with_entries(const Factor& factor, const Body& body) {
  if (factor.kind == 0)
    body(static_cast<const float*>(factor.entries));
  else if (factor.kind == 1)
    body(static_cast<const bfloat16*>(factor.entries));
  else
    body(static_cast<const float16*>(factor.entries));
}

// ---- short rows --------------------------------------------------------------------------------------------------
// Make the short rows scale * X Aᵀ of every segment: those of row i begin at `short_rows + i * step`, row after row in a
// segment, part after part in a row.
inline void shorten(Team& team, const float* x, int64_t in, const Segments& segments, float* short_rows, int64_t step) {
  const auto jobs_of = [&](int64_t s) -> int64_t {
    const Segment& segment = segments.list[s];
    const Patch* patch = segments.patch(segment);
    return patch == nullptr || patch->rank == 0 ? 0 : (segment.end - segment.start + SHORT_ROWS - 1) / SHORT_ROWS;
  };
  team.each_of(segments.count, jobs_of, [&](int64_t s, int64_t job) {
    const Segment& segment = segments.list[s];
    const Patch& patch = *segments.patch(segment);
    const int64_t begin = segment.start + job * SHORT_ROWS, end = std::min(begin + SHORT_ROWS, segment.end);
    float* const h = short_rows + segment.start * step + (begin - segment.start) * patch.rank;
    for (int part = 0; part < 3; ++part)
      if (patch.ranks[part] > 0)
        with_entries(patch.A[part], [&](const auto* A) {
          project(x + begin * in, A, end - begin, in, patch.rank, 0, patch.ranks[part],
                  static_cast<float>(patch.scale[part]), h + patch.offset[part]);
        });
  });
}

// ---- asking for what comes ----------------------------------------------------------------------------------------
// Which lines of memory hold what the adapters of some rows need at a tile. While the tile's base product is summed, they
// are asked for, a few at each step of it, so that they are there when it is done.
class Ahead {
 public:
  Ahead(const Weight& w, int64_t block, int64_t blocks, int64_t row, int64_t rows, const Segments& segments) {
    for (int64_t s = 0; s < segments.count; ++s) {
      const Segment& segment = segments.list[s];
      const Patch* patch = segments.patch(segment);
      if (patch == nullptr || segment.end <= row || segment.start >= row + rows) continue;
      if (segment.end - segment.start > TILE_ROWS) continue;  // the tile before has read them
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t* place = w.places + 4 * (block + j);
        const Factor& B = patch->B[place[0]];
        const int64_t of_row = patch->ranks[place[0]] * (B.kind == 0 ? 4 : 2);
        const char* first = static_cast<const char*>(B.entries) + place[1] * WIDTH * of_row;
        for (int64_t at = 0; at < place[3] * of_row && count_ < MOST; at += LINE) lines_[count_++] = first + at;
      }
    }
  }

  // How many lines are asked for at once when that is done in this many steps.
  int64_t at_once(int64_t steps) const { return (count_ + steps - 1) / steps; }

  // Called with each step of a loop that begins with the step `first` of all. It changes nothing, so unless it is made part
  // of that loop the compiler takes the call out.
  struct Asking {
    const Ahead& ahead;
    int64_t first, at_once;

    INLINE void operator()(int64_t step) const {
      const int64_t begin = (first + step) * at_once;
      for (int64_t l = begin; l < std::min(ahead.count_, begin + at_once); ++l) __builtin_prefetch(ahead.lines_[l]);
    }
  };

  Asking asking(int64_t first, int64_t at_once) const { return {*this, first, at_once}; }

 private:
  static constexpr int64_t LINE = 64, MOST = 2048;
  const char* lines_[MOST];
  int64_t count_ = 0;
};

// ---- sums of groups ----------------------------------------------------------------------------------------------
// Both vectors hold groups of LENGTH entries, of which the sums are wanted; so does the result, of half that length:
// first those of `a`, then those of `b`.
template <int LENGTH>
INLINE Vector fold(Vector a, Vector b) {
  Whole first, second;
  for (int lane = 0; lane < WIDTH; ++lane) {
    first[lane] = lane / (LENGTH / 2) * LENGTH + lane % (LENGTH / 2);
    second[lane] = first[lane] + LENGTH / 2;
  }
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}

// One vector of the sums of all groups, in order.
template <int LENGTH>
INLINE Vector fold_all(Vector (&v)[LENGTH]) {
  if constexpr (LENGTH == 1) {
    return v[0];
  } else {
    Vector folded[LENGTH / 2];
    for (int i = 0; i < LENGTH / 2; ++i) folded[i] = fold<LENGTH>(v[2 * i], v[2 * i + 1]);
    return fold_all<LENGTH / 2>(folded);
  }
}

// ---- products with B ---------------------------------------------------------------------------------------------
// The sums of a row are added up in the same order whatever else is in the step, so that they are the same to the last bit.

// h . B_o for WIDTH neighbouring outputs o of B (outputs, RANK), where whole rows of B fill a vector.
template <int RANK, class Entry>
INLINE Vector widen_short(const float* h, const Entry* B) {
  alignas(4 * WIDTH) float repeated[WIDTH];
  for (int lane = 0; lane < WIDTH; ++lane) repeated[lane] = h[lane % RANK];
  const Vector row = load(repeated);
  Vector sums[RANK];
  for (int i = 0; i < RANK; ++i) sums[i] = row * load(B + i * WIDTH);
  return fold_all<RANK>(sums);
}

// The same for any rank, of the first `columns` outputs.
template <class Entry>
INLINE Vector widen_long(const float* h, const Entry* B, int64_t rank, int64_t columns) {
  Vector sums[WIDTH] = {};
  int64_t k = 0;
  if (columns == WIDTH)
    for (; k + WIDTH <= rank; k += WIDTH) {
      const Vector row = load(h + k);
      for (int o = 0; o < WIDTH; ++o) sums[o] += row * load(B + o * rank + k);
    }
  for (; k < rank; k += WIDTH) {
    const int64_t some = std::min<int64_t>(WIDTH, rank - k);
    const Vector row = load<true>(h + k, some);
    for (int o = 0; o < WIDTH; ++o)
      if (o < columns) sums[o] += row * load<true>(B + o * rank + k, some);
  }
  return fold_all<WIDTH>(sums);
}

template <class Entry>
INLINE Vector widen(const float* h, const Entry* B, int64_t rank, int64_t columns) {
  if (columns == WIDTH) {
    if constexpr (WIDTH >= 8)
      if (rank == 8) return widen_short<8>(h, B);
    if (rank == 4) return widen_short<4>(h, B);
  }
  return widen_long(h, B, rank, columns);
}

// Add what the adapters change to the rows `row` to `row + rows` of a tile of `blocks` blocks.
[[gnu::noinline]] inline void patch_tile(const Weight& w, int64_t block, int64_t blocks, int64_t row, int64_t rows,
                                         const Segments& segments, const float* short_rows, int64_t step, float* sums) {
  for (int64_t s = 0; s < segments.count; ++s) {
    const Segment& segment = segments.list[s];
    if (segment.end <= row) continue;
    if (segment.start >= row + rows) break;
    const Patch* patch = segments.patch(segment);
    if (patch == nullptr) continue;
    const int64_t begin = std::max(segment.start, row), end = std::min(segment.end, row + rows);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t* place = w.places + 4 * (block + j);
      const int64_t part = place[0], rank = patch->ranks[part];
      float* const column = sums + ((begin - row) * blocks + j) * WIDTH;
      if (rank > 0) {
        const float* h =
            short_rows + segment.start * step + (begin - segment.start) * patch->rank + patch->offset[part];
        with_entries(patch->B[part], [&](const auto* B) {
          B += place[1] * WIDTH * rank;
          for (int64_t i = 0; i < end - begin; ++i) {
            float* const entry = column + i * blocks * WIDTH;
            store(entry, load(entry) + widen(h + i * patch->rank, B, rank, place[3]));
          }
        });
      }
      if (patch->gain != nullptr || patch->shift != nullptr) {
        const int64_t at = (block + j) * WIDTH;
        const Vector gain = patch->gain == nullptr ? Vector{} + 1.f : load(patch->gain + at);
        const Vector shift = patch->shift == nullptr ? Vector{} : load(patch->shift + at);
        for (int64_t i = 0; i < end - begin; ++i) {
          float* const entry = column + i * blocks * WIDTH;
          store(entry, gain * load(entry) + shift);
        }
      }
    }
  }
}

}  // namespace lorakit
