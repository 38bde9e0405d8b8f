// The loops behind decoder.h. All threads go through one step together: `#pragma omp for` shares out the work of each part,
// and its end is where they wait for each other.

#include "decoder.h"

#include <vector>

#include "attention.h"
#include "products.h"
#include "tiles.h"

namespace lorakit {
namespace {

// Rows whose short rows are made at a time.
constexpr int64_t SHORT_ROWS = 12;

struct Segments {
  const Segment* list;
  int64_t count;
  int64_t site;  // which weight

  const Patch* patch(const Segment& s) const { return s.patches == nullptr ? nullptr : s.patches + site; }
};

// Rows of a tile when `rows` are shared out evenly.
int64_t tile_height(int64_t rows) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  return (rows + tiles - 1) / tiles;
}

// ---- products ----------------------------------------------------------------------------------------------------
int64_t short_jobs(const Segments& segments, const Segment& segment) {
  const Patch* patch = segments.patch(segment);
  return patch == nullptr || patch->rank == 0 ? 0 : (segment.end - segment.start + SHORT_ROWS - 1) / SHORT_ROWS;
}

// Make the short rows X Aᵀ of every segment: those of row i begin at `short_rows + i * step`, row after row in a segment.
void shorten(const float* x, int64_t in, const Segments& segments, float* short_rows, int64_t step) {
  int64_t jobs = 0;
  for (int64_t s = 0; s < segments.count; ++s) jobs += short_jobs(segments, segments.list[s]);
  if (jobs == 0) return;  // the same for all threads
#pragma omp for schedule(dynamic, 1)
  for (int64_t job = 0; job < jobs; ++job) {
    int64_t s = 0, left = job;
    for (;; ++s) {
      const int64_t mine = short_jobs(segments, segments.list[s]);
      if (left < mine) break;
      left -= mine;
    }
    const Segment& segment = segments.list[s];
    const Patch* patch = segments.patch(segment);
    const int64_t begin = segment.start + left * SHORT_ROWS, end = std::min(begin + SHORT_ROWS, segment.end);
    project(x + begin * in, patch->A, end - begin, in, patch->rank, 0, patch->rank, 1.f,
            short_rows + segment.start * step + (begin - segment.start) * patch->rank);
  }
}

// Add what the adapters change to the rows `row` to `row + ROWS` of a tile of BLOCKS blocks.
template <int ROWS, int BLOCKS>
void patch_tile(const Weight& w, int64_t block, int64_t row, const Segments& segments, const float* short_rows,
                int64_t step, float* sums) {
  for (int64_t s = 0; s < segments.count; ++s) {
    const Segment& segment = segments.list[s];
    if (segment.end <= row) continue;
    if (segment.start >= row + ROWS) break;
    const Patch* patch = segments.patch(segment);
    if (patch == nullptr) continue;
    const int64_t begin = std::max(segment.start, row), end = std::min(segment.end, row + ROWS);
    for (int j = 0; j < BLOCKS; ++j) {
      const int64_t* place = w.places + 4 * (block + j);
      const int64_t rank = patch->ranks[place[0]];
      float* const column = sums + j * WIDTH;
      if (rank > 0) {
        const float* B = patch->B[place[0]] + place[1] * rank * WIDTH;
        const float* h =
            short_rows + segment.start * step + (begin - segment.start) * patch->rank + patch->offset[place[0]];
        if (end - begin == ROWS) {
          accumulate<ROWS, 1>(h, patch->rank, &B, WIDTH, rank, column, BLOCKS * WIDTH);
        } else {
          for (int64_t i = begin; i < end; ++i, h += patch->rank)
            accumulate<1, 1>(h, 0, &B, WIDTH, rank, column + (i - row) * BLOCKS * WIDTH, 0);
        }
      }
      if (patch->gain != nullptr || patch->shift != nullptr) {
        const int64_t at = (block + j) * WIDTH;
        const Vector gain = patch->gain == nullptr ? Vector{} + 1.f : load(patch->gain + at);
        const Vector shift = patch->shift == nullptr ? Vector{} : load(patch->shift + at);
        for (int64_t i = begin - row; i < end - row; ++i) {
          float* const entry = column + i * BLOCKS * WIDTH;
          store(entry, gain * load(entry) + shift);
        }
      }
    }
  }
}

struct Input {
  const float* x;
  CodeRows codes;
  int64_t rows;
};

template <int ROWS, int BLOCKS>
void multiply_tile(const Weight& w, const Input& input, int64_t block, int64_t row, float* sums) {
  if (w.blocks != nullptr) {
    const float* blocks[BLOCKS];
    for (int j = 0; j < BLOCKS; ++j) blocks[j] = w.blocks + (block + j) * w.in * WIDTH;
    std::fill_n(sums, ROWS * BLOCKS * WIDTH, 0.f);
    accumulate<ROWS, BLOCKS>(input.x + row * w.in, w.in, blocks, WIDTH, w.in, sums, BLOCKS * WIDTH);
    return;
  }
  const CodeRows& all = input.codes;
  const int64_t groups = all.n / CODES_AT_ONCE;
  const int8_t* codes[BLOCKS];
  const float* scales[BLOCKS];
  for (int j = 0; j < BLOCKS; ++j) {
    codes[j] = w.codes + (block + j) * all.n * WIDTH;
    scales[j] = w.scales + (block + j) * groups * WIDTH;
  }
  const CodeRows mine{all.codes + row * all.n, all.scales + row * groups, all.sums + row * groups, all.n};
  multiply_codes<ROWS, BLOCKS>(mine, codes, scales, sums, BLOCKS * WIDTH);
}

// Call `finish(first row, rows, first block, blocks, sums)` for every tile of Y.
template <class Finish>
void multiply(const Weight& w, const Input& input, const Segments& segments, const float* short_rows, int64_t step,
              const Finish& finish) {
  const int64_t height = tile_height(input.rows), pairs = (w.count + 1) / TILE_BLOCKS;
#pragma omp for schedule(dynamic, 1)
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t block = pair * TILE_BLOCKS;
    alignas(64) float sums[TILE_ROWS * TILE_COLUMNS];
    for (int64_t row = 0; row < input.rows; row += height) {
      with_constant<TILE_ROWS>(std::min(height, input.rows - row), [&](auto rows) {
        constexpr int ROWS = decltype(rows)::value;
        if (block + 1 < w.count) {
          multiply_tile<ROWS, 2>(w, input, block, row, sums);
          patch_tile<ROWS, 2>(w, block, row, segments, short_rows, step, sums);
          finish(row, ROWS, block, 2, sums);
        } else {
          multiply_tile<ROWS, 1>(w, input, block, row, sums);
          patch_tile<ROWS, 1>(w, block, row, segments, short_rows, step, sums);
          finish(row, ROWS, block, 1, sums);
        }
      });
    }
  }
}

// How a tile is written: over Y, or added to it.
template <bool ADD>
struct Write {
  const Weight& w;
  float* y;
  int64_t y_step;

  void operator()(int64_t row, int64_t rows, int64_t block, int64_t blocks, const float* sums) const {
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t* place = w.places + 4 * (block + j);
      for (int64_t i = 0; i < rows; ++i) {
        float* to = y + (row + i) * y_step + place[2];
        Vector v = load(sums + (i * blocks + j) * WIDTH);
        if (w.bias != nullptr) v += load(w.bias + (block + j) * WIDTH);
        if (place[3] == WIDTH) {
          store(to, ADD ? load(to) + v : v);
        } else {
          const Vector before = ADD ? load<true>(to, place[3]) : Vector{};
          store<true>(to, before + v, place[3]);
        }
      }
    }
  }
};

// A pair of blocks, of the gate and of what it lets through, becomes one.
struct Gate {
  const Weight& w;
  float* y;
  int64_t y_step;
  bool gelu;

  void operator()(int64_t row, int64_t rows, int64_t block, int64_t, const float* sums) const {
    const int64_t* place = w.places + 4 * block;
    for (int64_t i = 0; i < rows; ++i) {
      Vector gate = load(sums + 2 * i * WIDTH), up = load(sums + (2 * i + 1) * WIDTH);
      if (w.bias != nullptr) {
        gate += load(w.bias + block * WIDTH);
        up += load(w.bias + (block + 1) * WIDTH);
      }
      const Vector v = (gelu ? gelu_by_tanh(gate) : silu(gate)) * up;
      float* to = y + (row + i) * y_step + place[2];
      if (place[3] == WIDTH)
        store(to, v);
      else
        store<true>(to, v, place[3]);
    }
  }
};

// ---- the rest of a layer -----------------------------------------------------------------------------------------
struct Caches {
  float *keys, *values;  // of one layer: (kv_heads, capacity, head_dim)
};

// Rotate queries and keys of one row, and put keys and values where the request keeps them.
void keep_row(const Decoder& d, const Layer& layer, const Caches& caches, float* qkv, const float* cos, const float* sin,
              int64_t slot) {
  const int64_t n = d.head_dim;
  for (int64_t h = 0; h < d.heads; ++h) {
    float* q = qkv + h * n;
    if (layer.q_norm != nullptr) normalize(q, layer.q_norm, n, d.epsilon, q);
    rotate(q, cos, sin, n, static_cast<float>(d.scale));
  }
  for (int64_t h = 0; h < d.kv_heads; ++h) {
    float* k = qkv + (d.heads + h) * n;
    const float* v = qkv + (d.heads + d.kv_heads + h) * n;
    if (layer.k_norm != nullptr) normalize(k, layer.k_norm, n, d.epsilon, k);
    rotate(k, cos, sin, n, 1.f);
    put_in_block(k, n, slot, caches.keys + h * d.capacity * n);
    std::copy_n(v, n, caches.values + (h * d.capacity + slot) * n);
  }
}

// What each row sees of its request: `qkv` holds rotated queries, `y` gets (rows, heads * head_dim).
void attend(const Decoder& d, const Step& s, const Caches& caches, const float* qkv, float* y,
            std::vector<float>& scratch) {
  const int64_t n = d.head_dim, group = d.heads / d.kv_heads, qkv_step = (d.heads + 2 * d.kv_heads) * n;
  const int64_t y_step = d.heads * n;
  int64_t jobs = 0;
  for (int64_t p = 0; p < s.n_pieces; ++p) {
    const int64_t queries = (s.pieces[4 * p + 1] - s.pieces[4 * p]) * group;
    jobs += (queries + TILE_ROWS - 1) / TILE_ROWS * d.kv_heads;
  }
#pragma omp for schedule(dynamic, 1)
  for (int64_t job = 0; job < jobs; ++job) {
    int64_t p = 0, left = job, tiles = 0;
    for (;; ++p) {
      tiles = ((s.pieces[4 * p + 1] - s.pieces[4 * p]) * group + TILE_ROWS - 1) / TILE_ROWS;
      if (left < tiles * d.kv_heads) break;
      left -= tiles * d.kv_heads;
    }
    const int64_t* piece = s.pieces + 4 * p;
    const int64_t head = left / tiles, first = left % tiles * TILE_ROWS, all = (piece[1] - piece[0]) * group;
    const int64_t rows = std::min<int64_t>(TILE_ROWS, all - first);
    float queries[TILE_ROWS * MOST_HEAD];
    int64_t seen[TILE_ROWS], most = 0;
    float* to[TILE_ROWS];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = (first + i) / group, h = head * group + (first + i) % group;
      std::copy_n(qkv + (piece[0] + token) * qkv_step + h * n, n, queries + i * n);
      seen[i] = piece[2] + token + 1;
      most = std::max(most, seen[i]);
      to[i] = y + (piece[0] + token) * y_step + h * n;
    }
    scratch.resize(static_cast<size_t>(rows * padded(most, TILE_COLUMNS)));
    const int64_t at = (head * d.capacity + piece[3]) * n;
    with_constant<TILE_ROWS>(rows, [&](auto count) {
      attend_tile<decltype(count)::value>(queries, seen, most, caches.keys + at, {caches.values + at, n}, n,
                                          scratch.data(), to, nullptr);
    });
  }
}

// ---- a step ------------------------------------------------------------------------------------------------------
void normalize_rows(const float* x, const int64_t* which, int64_t rows, const float* weight, const Decoder& d, float* y) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    normalize(x + (which == nullptr ? i : which[i]) * d.hidden, weight, d.hidden, d.epsilon, y + i * d.hidden);
}

// What a product reads; for a weight in int8 the rows as codes.
Input input_for(const Weight& w, const float* x, int64_t rows, const Step& s) {
  const int64_t n = padded(w.in, CODES_AT_ONCE), groups = n / CODES_AT_ONCE;
  const Input input{x, {s.codes, s.code_scales, s.code_sums, n}, rows};
  if (w.codes == nullptr) return input;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    to_codes(x + i * w.in, w.in, s.codes + i * n, s.code_scales + i * groups, s.code_sums + i * groups);
  return input;
}

template <class Finish>
void linear(const Weight& w, const float* x, int64_t rows, const Step& s, const Segments& segments,
            const Finish& finish) {
  shorten(x, w.in, segments, s.short_rows, s.widest_rank);
  multiply(w, input_for(w, x, rows, s), segments, s.short_rows, s.widest_rank, finish);
}

void run(const Decoder& d, const Step& s) {
  const int64_t qkv_width = (d.heads + 2 * d.kv_heads) * d.head_dim;
  std::vector<float> scratch;
  for (int64_t l = 0; l < d.n_layers; ++l) {
    const Layer& layer = d.layers[l];
    const int64_t size = d.kv_heads * d.capacity * d.head_dim;
    const Caches caches{d.keys + l * size, d.values + l * size};
    const auto at = [&](int64_t site) { return Segments{s.segments, s.n_segments, 4 * l + site}; };
    normalize_rows(s.x, nullptr, s.rows, layer.input_norm, d, s.normed);
    linear(layer.qkv, s.normed, s.rows, s, at(0), Write<false>{layer.qkv, s.qkv, qkv_width});
#pragma omp for schedule(static)
    for (int64_t p = 0; p < s.n_pieces; ++p) {
      const int64_t* piece = s.pieces + 4 * p;
      for (int64_t row = piece[0]; row < piece[1]; ++row)
        keep_row(d, layer, caches, s.qkv + row * qkv_width, s.cos + row * d.head_dim, s.sin + row * d.head_dim,
                 piece[3] + piece[2] + row - piece[0]);
    }
    attend(d, s, caches, s.qkv, s.seen, scratch);
    linear(layer.out, s.seen, s.rows, s, at(1), Write<true>{layer.out, s.x, d.hidden});
    normalize_rows(s.x, nullptr, s.rows, layer.post_norm, d, s.normed);
    linear(layer.gate_up, s.normed, s.rows, s, at(2), Gate{layer.gate_up, s.acted, d.middle, d.gelu != 0});
    linear(layer.down, s.acted, s.rows, s, at(3), Write<true>{layer.down, s.x, d.hidden});
  }
  if (s.n_last == 0) return;  // no prompt ends in this step
  const int64_t vocabulary = d.head.places[4 * (d.head.count - 1) + 2] + d.head.places[4 * (d.head.count - 1) + 3];
  normalize_rows(s.x, s.last, s.n_last, d.norm, d, s.normed);
  linear(d.head, s.normed, s.n_last, s, Segments{s.last_segments, s.n_last_segments, 4 * d.n_layers},
         Write<false>{d.head, s.logits, vocabulary});
}

}  // namespace
}  // namespace lorakit

extern "C" {

// Entries of a block: how weights and keys are to be cut.
[[gnu::visibility("default")]] int64_t lorakit_width() { return lorakit::WIDTH; }

[[gnu::visibility("default")]] void lorakit_decoder_step(const lorakit::Decoder* decoder, const lorakit::Step* step) {
#pragma omp parallel num_threads(static_cast<int>(step->threads))
  lorakit::run(*decoder, *step);
}
}
