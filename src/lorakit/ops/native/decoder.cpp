// The loops behind decoder.h. All threads go through one step together: `team.each` shares out the work of each part, and its
// end is where they wait for each other.

#include "decoder.h"

#include <omp.h>

#include <optional>
#include <vector>

#include "attention.h"
#include "patches.h"
#include "tiles.h"

namespace lorakit {
namespace {

// Rows of a tile: all of them while one block's sums fit into the registers, so that every weight is read once and reading
// goes on all the time; else they are shared out evenly.
int64_t tile_height(int64_t rows) {
  if (rows <= TALL_ROWS) return rows;
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  return (rows + tiles - 1) / tiles;
}

// ---- products ----------------------------------------------------------------------------------------------------
// What a product reads, tile after tile: each as columns, or for a weight in int8 as codes.
struct Input {
  const float* columns;
  CodeRows codes;
  int64_t rows;
};

void multiply_blocks(const Weight& w, const float* columns, int64_t block, int64_t blocks, int64_t rows, const Ahead& ahead,
                     float* sums) {
  const float* all[TILE_BLOCKS];
  for (int64_t j = 0; j < blocks; ++j) all[j] = w.blocks + (block + j) * w.in * WIDTH;
  const int64_t step = blocks * WIDTH;
  const bool side_by_side = blocks == TILE_BLOCKS && rows <= TILE_ROWS;
  const int64_t at_once = ahead.at_once(side_by_side ? w.in : blocks * w.in);
  std::fill_n(sums, rows * step, 0.f);
  if (side_by_side)
    with_constant<TILE_ROWS>(rows, [&](auto count) {
      accumulate<decltype(count)::value, TILE_BLOCKS, true>(columns, 0, all, WIDTH, w.in, sums, step,
                                                            ahead.asking(0, at_once));
    });
  else
    with_constant<TALL_ROWS>(rows, [&](auto count) {
      for (int64_t j = 0; j < blocks; ++j)
        accumulate<decltype(count)::value, 1, true>(columns, 0, all + j, WIDTH, w.in, sums + j * WIDTH, step,
                                                    ahead.asking(j * w.in, at_once));
    });
}

void multiply_codes(const Weight& w, const CodeRows& x, int64_t block, int64_t blocks, int64_t row, int64_t rows,
                    const Ahead& ahead, float* sums) {
  const int64_t groups = x.n / CODES_AT_ONCE, step = blocks * WIDTH;
  const int64_t at_once = ahead.at_once((rows + CODE_ROWS - 1) / CODE_ROWS * groups);
  const int8_t* codes[TILE_BLOCKS];
  const float* scales[TILE_BLOCKS];
  for (int64_t j = 0; j < blocks; ++j) {
    codes[j] = w.codes + (block + j) * x.n * WIDTH;
    scales[j] = w.scales + (block + j) * groups * WIDTH;
  }
  for (int64_t i = 0; i < rows; i += CODE_ROWS) {
    const CodeRows some{x.codes + (row + i) * x.n, x.scales + (row + i) * groups, x.sums + (row + i) * groups, x.n};
    const auto ask = ahead.asking(i / CODE_ROWS * groups, at_once);
    with_constant<CODE_ROWS>(std::min<int64_t>(CODE_ROWS, rows - i), [&](auto count) {
      if (blocks == TILE_BLOCKS)
        multiply_codes<decltype(count)::value, TILE_BLOCKS>(some, codes, scales, sums + i * step, step, ask);
      else
        multiply_codes<decltype(count)::value, 1>(some, codes, scales, sums + i * step, step, ask);
    });
  }
}

// Call `finish(first row, rows, first block, blocks, sums)` for every tile of Y.
template <class Finish>
void multiply(Team& team, const Weight& w, const Input& input, const Segments& segments, const float* short_rows, int64_t step,
              const Finish& finish) {
  const int64_t height = tile_height(input.rows), pairs = (w.count + 1) / TILE_BLOCKS;
  team.each(pairs, [&](int64_t pair) {
    const int64_t block = pair * TILE_BLOCKS, blocks = std::min<int64_t>(TILE_BLOCKS, w.count - block);
    alignas(64) float sums[TALL_ROWS * TILE_COLUMNS];
    for (int64_t row = 0; row < input.rows; row += height) {
      const int64_t rows = std::min(height, input.rows - row);
      const Ahead ahead(w, block, blocks, row, rows, segments);
      if (w.blocks != nullptr)
        multiply_blocks(w, input.columns + row * w.in, block, blocks, rows, ahead, sums);
      else
        multiply_codes(w, input.codes, block, blocks, row, rows, ahead, sums);
      patch_tile(w, block, blocks, row, rows, segments, short_rows, step, sums);
      finish(row, rows, block, blocks, sums);
    }
  });
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

// All rows. Neighbouring keys lie in the same lines of memory, so one thread takes some at a time.
void keep(Team& team, const Decoder& d, const Layer& layer, const Step& s, const Caches& caches, int64_t qkv_width) {
  const auto jobs_of = [&](int64_t p) { return (s.pieces[4 * p + 1] - s.pieces[4 * p] + WIDTH - 1) / WIDTH; };
  team.each_of(s.n_pieces, jobs_of, [&](int64_t p, int64_t job) {
    const int64_t* piece = s.pieces + 4 * p;
    const int64_t first = piece[0] + job * WIDTH, end = std::min<int64_t>(first + WIDTH, piece[1]);
    for (int64_t row = first; row < end; ++row)
      keep_row(d, layer, caches, s.qkv + row * qkv_width, s.cos + row * d.head_dim, s.sin + row * d.head_dim,
               piece[3] + piece[2] + row - piece[0]);
  });
}

// What each row sees of its request: `qkv` holds rotated queries, `y` gets (rows, heads * head_dim).
void attend(Team& team, const Decoder& d, const Step& s, const Caches& caches, const float* qkv, float* y,
            std::vector<float>& scratch) {
  const int64_t n = d.head_dim, group = d.heads / d.kv_heads, qkv_step = (d.heads + 2 * d.kv_heads) * n;
  const int64_t y_step = d.heads * n;
  const auto tiles_of = [&](int64_t p) {
    return ((s.pieces[4 * p + 1] - s.pieces[4 * p]) * group + TILE_ROWS - 1) / TILE_ROWS;
  };
  const auto jobs_of = [&](int64_t p) { return tiles_of(p) * d.kv_heads; };
  team.each_of(s.n_pieces, jobs_of, [&](int64_t p, int64_t job) {
    const int64_t tiles = tiles_of(p);
    const int64_t* piece = s.pieces + 4 * p;
    const int64_t head = job / tiles, first = job % tiles * TILE_ROWS, all = (piece[1] - piece[0]) * group;
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
  });
}

// ---- a step ------------------------------------------------------------------------------------------------------
void normalize_rows(Team& team, const float* x, const int64_t* which, int64_t rows, const float* weight,
                    const Decoder& d, float* y) {
  team.each(rows, [&](int64_t i) {
    normalize(x + (which == nullptr ? i : which[i]) * d.hidden, weight, d.hidden, d.epsilon, y + i * d.hidden);
  });
}

Input input_for(Team& team, const Weight& w, const float* x, int64_t rows, const Step& s) {
  const int64_t n = padded(w.in, CODES_AT_ONCE), groups = n / CODES_AT_ONCE, height = tile_height(rows);
  if (w.codes == nullptr)
    team.each((rows + height - 1) / height, [&](int64_t tile) {
      const int64_t row = tile * height;
      to_columns(x + row * w.in, std::min(height, rows - row), w.in, s.columns + row * w.in);
    });
  else
    team.each(rows, [&](int64_t i) {
      to_codes(x + i * w.in, w.in, s.codes + i * n, s.code_scales + i * groups, s.code_sums + i * groups);
    });
  return {s.columns, {s.codes, s.code_scales, s.code_sums, n}, rows};
}

template <class Finish>
void linear(Team& team, const Weight& w, const float* x, int64_t rows, const Step& s, const Segments& segments,
            const Finish& finish) {
  shorten(team, x, w.in, segments, s.short_rows, s.widest_rank);
  multiply(team, w, input_for(team, w, x, rows, s), segments, s.short_rows, s.widest_rank, finish);
}

void run(Team& team, const Decoder& d, const Step& s) {
  const int64_t qkv_width = (d.heads + 2 * d.kv_heads) * d.head_dim;
  std::vector<float> scratch;
  for (int64_t l = 0; l < d.n_layers; ++l) {
    const Layer& layer = d.layers[l];
    const int64_t size = d.kv_heads * d.capacity * d.head_dim;
    const Caches caches{d.keys + l * size, d.values + l * size};
    const auto at = [&](int64_t site) { return Segments{s.segments, s.n_segments, 4 * l + site}; };
    normalize_rows(team, s.x, nullptr, s.rows, layer.input_norm, d, s.normed);
    linear(team, layer.qkv, s.normed, s.rows, s, at(0), Write<false>{layer.qkv, s.qkv, qkv_width});
    keep(team, d, layer, s, caches, qkv_width);
    attend(team, d, s, caches, s.qkv, s.seen, scratch);
    linear(team, layer.out, s.seen, s.rows, s, at(1), Write<true>{layer.out, s.x, d.hidden});
    normalize_rows(team, s.x, nullptr, s.rows, layer.post_norm, d, s.normed);
    linear(team, layer.gate_up, s.normed, s.rows, s, at(2), Gate{layer.gate_up, s.acted, d.middle, d.gelu != 0});
    linear(team, layer.down, s.acted, s.rows, s, at(3), Write<true>{layer.down, s.x, d.hidden});
  }
  if (s.n_last == 0) return;  // no prompt ends in this step
  const int64_t vocabulary = d.head.places[4 * (d.head.count - 1) + 2] + d.head.places[4 * (d.head.count - 1) + 3];
  normalize_rows(team, s.x, s.last, s.n_last, d.norm, d, s.normed);
  linear(team, d.head, s.normed, s.n_last, s, Segments{s.last_segments, s.n_last_segments, 4 * d.n_layers},
         Write<false>{d.head, s.logits, vocabulary});
}

}  // namespace
}  // namespace lorakit

extern "C" {

// Entries of a block: how weights and keys are to be cut.
[[gnu::visibility("default")]] int64_t lorakit_width() { return lorakit::WIDTH; }

[[gnu::visibility("default")]] void lorakit_decoder_step(const lorakit::Decoder* decoder, const lorakit::Step* step) {
  std::optional<lorakit::Team> team;
#pragma omp parallel num_threads(static_cast<int>(step->threads))
  {
#pragma omp single
    team.emplace(omp_get_num_threads());
    lorakit::run(*team, *decoder, *step);
  }
}
}
