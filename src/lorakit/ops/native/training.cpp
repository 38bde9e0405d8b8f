// The loops behind training.h.

#include "training.h"

#include <vector>

#include "attention.h"
#include "products.h"
#include "tiles.h"

namespace lorakit {
namespace {

// Numbers that are worth waking a thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 14;
// Entries that a thread takes at a time.
constexpr int64_t ENTRIES_AT_ONCE = 1 << 12;
// Rows of queries whose scores are kept at a time: then keys and values gain from all of them at once.
constexpr int64_t QUERIES = 4 * TILE_ROWS;

int team(int64_t numbers, int64_t threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min(threads, numbers / WORTH_A_THREAD)));
}

float* grown(std::vector<float>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
  return v.data();
}

// ---- norms -------------------------------------------------------------------------------------------------------
// With y = weight * x * factor: dx = factor * (dy * weight - y / weight * mean(dy * y)); x itself is not needed.
void normalize_back(const float* dy, const float* y, const float* weight, float factor, int64_t n, float* dx) {
  double sum = 0;
  int64_t k = 0;
  Vector sums{};
  for (; k + WIDTH <= n; k += WIDTH) sums += load(dy + k) * load(y + k);
  for (int j = 0; j < WIDTH; ++j) sum += sums[j];
  for (; k < n; ++k) sum += dy[k] * y[k];
  const float mean = static_cast<float>(sum / static_cast<double>(n));
  for (k = 0; k < n; ++k) dx[k] = factor * (dy[k] * weight[k] - y[k] / weight[k] * mean);
}

// ---- gates -------------------------------------------------------------------------------------------------------
template <bool PART>
INLINE void gate_back(const float* dy, const float* gate, const float* up, int64_t count, float* dgate, float* dup) {
  const Vector g = load<PART>(gate, count), out = load<PART>(dy, count);
  const Vector open = 1.f / (1.f + exponential(-g)), acted = g * open;
  store<PART>(dup, out * acted, count);
  store<PART>(dgate, out * load<PART>(up, count) * (open + acted * (1.f - open)), count);
}

// Call `body(part, first entry, entries)` for vectors of entries; the last may be a part of one.
template <class Body>
INLINE void each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t k = begin;
  for (; k + WIDTH <= end; k += WIDTH) body(std::false_type(), k, static_cast<int64_t>(WIDTH));
  if (k < end) body(std::true_type(), k, end - k);
}

INLINE void gate_all(const float* gate, const float* up, int64_t begin, int64_t end, float* y) {
  each_vector(begin, end, [&](auto part, int64_t k, int64_t some) {
    constexpr bool PART = decltype(part)::value;
    store<PART>(y + k, silu(load<PART>(gate + k, some)) * load<PART>(up + k, some), some);
  });
}

INLINE void gate_all_back(const float* dy, const float* gate, const float* up, int64_t begin, int64_t end, float* dgate,
                          float* dup) {
  each_vector(begin, end, [&](auto part, int64_t k, int64_t some) {
    gate_back<decltype(part)::value>(dy + k, gate + k, up + k, some, dgate + k, dup + k);
  });
}

// ---- low-rank products of one input ------------------------------------------------------------------------------
// Each goes over the tokens once, a few at a time, which stay in the cache for all that is done with them.
void add_products(const Products& p) {
#pragma omp parallel for schedule(static) num_threads(team(p.tokens * p.n, p.threads))
  for (int64_t t = 0; t < p.tokens; t += TOKENS_AT_ONCE) {
    const int64_t some = std::min(TOKENS_AT_ONCE, p.tokens - t);
    const float* A = p.A;
    float* h = p.h + t * p.r;
    for (int64_t i = 0; i < p.count; ++i) {
      const Product& one = p.each[i];
      project(p.x + t * p.n, A, some, p.n, p.r, 0, one.r, static_cast<float>(one.scale), h);
      expand(h, p.r, one.B, some, one.out, one.r, 0, one.out, true, one.y + t * one.out, one.out);
      A += one.r * p.n;
      h += one.r;
    }
    if (p.gated != nullptr) {
      const int64_t out = p.each[0].out;
      gate_all(p.each[0].y, p.each[1].y, t * out, (t + some) * out, p.gated);
    }
  }
}

// The derivatives of the factors are sums over all tokens. They are made in so many parts, each of tokens that follow each
// other, whoever makes them: so the result does not depend on the number of threads.
constexpr int64_t PARTS = 16;
// Tokens at a time where they also go through a gate.
constexpr int64_t GATED_AT_ONCE = TOKENS_AT_ONCE / 2;

// With G = dL/dy: dB = Gᵀ h, dh = scale * G B, dA = dhᵀ x, dx = dh A. The sums of one part go to `sums`, in the order of
// `results` below: dA, that of the next layer, each dB.
void add_products_back(const Products& p, int64_t begin, int64_t end, float* sums) {
  const int64_t at_once = p.dgated != nullptr ? GATED_AT_ONCE : TOKENS_AT_ONCE;
  thread_local std::vector<float> room, gated_room;
  float* const scratch = grown(room, at_once * p.r);
  for (int64_t t = begin; t < end; t += at_once) {
    const int64_t some = std::min(at_once, end - t);
    float* const dh = p.dh != nullptr ? p.dh + t * p.r : scratch;
    float* dB = sums + (p.x != nullptr ? p.r * p.n : 0);
    if (p.dgated != nullptr) {
      const Product &gate = p.each[0], &up = p.each[1];
      const int64_t from = t * gate.out, count = some * gate.out;
      gate_all_back(p.dgated, gate.y, up.y, from, from + count, gate.dy, up.dy);
      if (p.next_dh != nullptr) {
        float* const gated = grown(gated_room, count);
        gate_all(gate.y + from, up.y + from, 0, count, gated);
        collect(p.next_dh + t * p.next_r, p.next_r, gated, some, gate.out, p.next_r, 0, gate.out, t > begin, dB);
        dB += p.next_r * gate.out;
      }
    }
    int64_t first = 0;
    for (int64_t i = 0; i < p.count; ++i) {
      const Product& one = p.each[i];
      const float* G = one.dy + t * one.out;
      project(G, one.B, some, one.out, p.r, 0, one.r, static_cast<float>(one.scale), dh + first);
      collect(p.h + t * p.r + first, p.r, G, some, one.out, one.r, 0, one.out, t > begin, dB);
      dB += one.r * one.out;
      first += one.r;
    }
    if (p.x != nullptr) collect(dh, p.r, p.x + t * p.n, some, p.n, p.r, 0, p.n, t > begin, sums);
    if (p.dx != nullptr) expand(dh, p.r, p.A, some, p.n, p.r, 0, p.n, false, p.dx + t * p.n, p.n);
  }
}

void add_products_back(const Products& p) {
  const int64_t each = std::max(TOKENS_AT_ONCE, padded((p.tokens + PARTS - 1) / PARTS, 8));
  const int64_t parts = (p.tokens + each - 1) / each;
  std::vector<std::pair<float*, int64_t>> results;
  if (p.x != nullptr) results.emplace_back(p.dA, p.r * p.n);
  if (p.next_dh != nullptr) results.emplace_back(p.next_dA, p.next_r * p.each[0].out);
  for (int64_t i = 0; i < p.count; ++i) results.emplace_back(p.each[i].dB, p.each[i].r * p.each[i].out);
  int64_t size = 0;
  for (const auto& result : results) size += result.second;
  thread_local std::vector<float> room;
  float* const sums = grown(room, parts * size);
#pragma omp parallel num_threads(team(p.tokens * p.n, p.threads))
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; ++part)
      add_products_back(p, part * each, std::min(p.tokens, (part + 1) * each), sums + part * size);
    const float* from = sums;
    for (const auto& [to, count] : results) {
#pragma omp for schedule(static) nowait
      for (int64_t k = 0; k < count; ++k) {
        float sum = from[k];
        for (int64_t part = 1; part < parts; ++part) sum += from[part * size + k];
        to[k] = sum;
      }
      from += count;
    }
  }
}

// ---- cross-entropy -----------------------------------------------------------------------------------------------
// -log softmax(x)[target], and its derivative, if wanted; that may be where x is.
float cross_entropy(const float* x, int64_t n, int64_t target, float* dx) {
  const float aim = x[target];
  Vector top = Vector{} + x[0];
  each_vector(0, n, [&](auto part, int64_t k, int64_t count) {
    if constexpr (!decltype(part)::value) {
      const Vector v = load(x + k);
      top = v > top ? v : top;
    } else {
      for (int64_t j = 0; j < count; ++j) top[0] = std::max(top[0], x[k + j]);
    }
  });
  float most = top[0];
  for (int j = 1; j < WIDTH; ++j) most = std::max(most, top[j]);
  // Sums of many thousands of numbers in float32 lose digits; each of these is a short one.
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += ENTRIES_AT_ONCE) {
    Vector sums{};
    float rest = 0;
    each_vector(begin, std::min(n, begin + ENTRIES_AT_ONCE), [&](auto part, int64_t k, int64_t count) {
      constexpr bool PART = decltype(part)::value;
      const Vector e = exponential(load<PART>(x + k, count) - most);
      if (dx != nullptr) store<PART>(dx + k, e, count);
      if constexpr (PART)
        for (int64_t j = 0; j < count; ++j) rest += e[j];
      else
        sums += e;
    });
    total += static_cast<double>(sum_of(sums)) + rest;
  }
  if (dx != nullptr) {
    const float per_total = static_cast<float>(1 / total);
    for (int64_t k = 0; k < n; ++k) dx[k] *= per_total;
    dx[target] -= 1;
  }
  return static_cast<float>(std::log(total) - (aim - most));
}

// ---- attention ---------------------------------------------------------------------------------------------------
// One document and one head of keys, with the heads of queries that share it.
struct Part {
  const Attention& a;
  int64_t begin, length, head, group;

  Part(const Attention& a, int64_t number)
      : a(a), begin(a.borders[number / a.kv_heads]), length(a.borders[number / a.kv_heads + 1] - begin),
        head(number % a.kv_heads), group(a.heads / a.kv_heads) {}

  int64_t queries() const { return length * group; }
  int64_t token(int64_t query) const { return begin + query / group; }
  int64_t query_head(int64_t query) const { return head * group + query % group; }
  // Where a query lies in q, y and their derivatives; in `logs`; and where a token's key does in k, v and theirs.
  int64_t at(int64_t query) const { return (token(query) * a.heads + query_head(query)) * a.n; }
  int64_t log_at(int64_t query) const { return token(query) * a.heads + query_head(query); }
  int64_t key_at(int64_t t) const { return ((begin + t) * a.kv_heads + head) * a.n; }

  void turned_query(int64_t query, float* to) const {
    copy_head(a.q + at(query), a.n, to);
    rotate(to, a.cos + token(query) * a.n, a.sin + token(query) * a.n, a.n, static_cast<float>(a.scale));
  }

  void turned_key(int64_t t, float* to) const {
    copy_head(a.k + key_at(t), a.n, to);
    rotate(to, a.cos + (begin + t) * a.n, a.sin + (begin + t) * a.n, a.n, 1.f);
  }
};

struct Scratch {
  std::vector<float> keys, key_rows, values, scores, changes, dk, dv;
};

void attend(const Part& part, Scratch& scratch) {
  const Attention& a = part.a;
  const int64_t n = a.n;
  float* keys = grown(scratch.keys, padded(part.length, WIDTH) * n);
  float row[MOST_HEAD];
  for (int64_t t = 0; t < part.length; ++t) {
    part.turned_key(t, row);
    put_in_block(row, n, t, keys);
  }
  float* scores = grown(scratch.scores, TILE_ROWS * padded(part.length, TILE_COLUMNS));
  float queries[TILE_ROWS * MOST_HEAD];
  for (int64_t first = 0; first < part.queries(); first += TILE_ROWS) {
    const int64_t rows = std::min<int64_t>(TILE_ROWS, part.queries() - first);
    int64_t seen[TILE_ROWS];
    float *to[TILE_ROWS], *logs[TILE_ROWS];
    for (int64_t i = 0; i < rows; ++i) {
      part.turned_query(first + i, queries + i * n);
      seen[i] = (first + i) / part.group + 1;
      to[i] = a.y + part.at(first + i);
      logs[i] = a.logs + part.log_at(first + i);
    }
    with_constant<TILE_ROWS>(rows, [&](auto count) {
      attend_tile<decltype(count)::value>(queries, seen, seen[rows - 1], keys, {a.v + part.key_at(0), a.kv_heads * n}, n,
                                          scores, to, logs);
    });
  }
}

// sums[j] += the sum over i of weights[i, j] * rows[i], for COUNT columns j of the weights.
template <int COUNT>
void spread(const float* weights, int64_t step, int64_t rows, const float* row, int64_t n, float* sums) {
  for (int64_t c = 0; c < n; c += WIDTH) {
    Vector tile[COUNT];
    for (int j = 0; j < COUNT; ++j) tile[j] = load(sums + j * n + c);
    for (int64_t i = 0; i < rows; ++i) {
      const Vector v = load(row + i * n + c);
      for (int j = 0; j < COUNT; ++j) tile[j] += weights[i * step + j] * v;
    }
    for (int j = 0; j < COUNT; ++j) store(sums + j * n + c, tile[j]);
  }
}

constexpr int SPREAD = MANY_REGISTERS ? 16 : 8;

void spread_over(const float* weights, int64_t step, int64_t rows, const float* row, int64_t count, int64_t n,
                 float* sums) {
  for (int64_t j = 0; j < count; j += SPREAD)
    with_constant<SPREAD>(std::min<int64_t>(SPREAD, count - j), [&](auto some) {
      spread<decltype(some)::value>(weights + j, step, rows, row, n, sums + j * n);
    });
}

// With P = softmax(Q Kᵀ): dV = Pᵀ dY, dS = P * (dY Vᵀ - the rows' dY . Y), dQ = dS K, dK = dSᵀ Q. P is made again.
void attend_back(const Part& part, Scratch& scratch) {
  const Attention& a = part.a;
  const int64_t n = a.n, blocks = padded(part.length, WIDTH) * n, step = padded(part.length, TILE_COLUMNS);
  float *keys = grown(scratch.keys, blocks), *key_rows = grown(scratch.key_rows, blocks),
        *values = grown(scratch.values, blocks), *scores = grown(scratch.scores, QUERIES * step),
        *changes = grown(scratch.changes, QUERIES * step), *dk = grown(scratch.dk, blocks),
        *dv = grown(scratch.dv, blocks);
  for (int64_t t = 0; t < part.length; ++t) {
    part.turned_key(t, key_rows + t * n);
    put_in_block(key_rows + t * n, n, t, keys);
    put_in_block(a.v + part.key_at(t), n, t, values);
  }
  std::fill_n(dk, blocks, 0.f);
  std::fill_n(dv, blocks, 0.f);
  std::vector<float> rows_of(static_cast<size_t>(2 * QUERIES * n));
  float *queries = rows_of.data(), *dy = queries + QUERIES * n;
  for (int64_t first = 0; first < part.queries(); first += QUERIES) {
    const int64_t all = std::min<int64_t>(QUERIES, part.queries() - first);
    const int64_t most = (first + all - 1) / part.group + 1;
    for (int64_t tile = 0; tile < all; tile += TILE_ROWS) {
      const int64_t rows = std::min<int64_t>(TILE_ROWS, all - tile);
      float *p = scores + tile * step, *d = changes + tile * step, inner[TILE_ROWS], ones[TILE_ROWS], *to[TILE_ROWS];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t query = first + tile + i;
        float *q = queries + (tile + i) * n, *g = dy + (tile + i) * n;
        part.turned_query(query, q);
        copy_head(a.dy + part.at(query), n, g);
        Vector sums{};
        for (int64_t c = 0; c < n; c += WIDTH) sums += load(g + c) * load(a.y + part.at(query) + c);
        inner[i] = sum_of(sums);
        ones[i] = 1;
        to[i] = a.dq + part.at(query);
      }
      with_constant<TILE_ROWS>(rows, [&](auto count) {
        constexpr int ROWS = decltype(count)::value;
        score<ROWS>(queries + tile * n, keys, most, n, p, step);
        score<ROWS>(dy + tile * n, values, most, n, d, step);
        for (int i = 0; i < ROWS; ++i) {
          const int64_t query = first + tile + i, seen = query / part.group + 1;
          const float log = a.logs[part.log_at(query)];
          float *weights = p + i * step, *change = d + i * step;
          for (int64_t k = 0; k < padded(most, WIDTH); k += WIDTH) {
            const Vector e = exponential(load(weights + k) - log);
            store(weights + k, e);
            store(change + k, e * (load(change + k) - inner[i]));
          }
          std::fill(weights + seen, weights + padded(most, WIDTH), 0.f);
          std::fill(change + seen, change + padded(most, WIDTH), 0.f);
        }
        weigh<ROWS>(d, step, {key_rows, n}, most, n, ones, to);
      });
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t token = part.token(first + tile + i);
        rotate_back(to[i], a.cos + token * n, a.sin + token * n, n, static_cast<float>(a.scale));
      }
    }
    spread_over(scores, step, all, dy, most, n, dv);
    spread_over(changes, step, all, queries, most, n, dk);
  }
  for (int64_t t = 0; t < part.length; ++t) {
    const int64_t token = part.begin + t;
    rotate_back(dk + t * n, a.cos + token * n, a.sin + token * n, n, 1.f);
    copy_head(dk + t * n, n, a.dk + part.key_at(t));
    copy_head(dv + t * n, n, a.dv + part.key_at(t));
  }
}

template <class Body>
void each_part(const Attention& a, const Body& body) {
#pragma omp parallel num_threads(team(a.borders[a.documents] * a.heads * a.n, a.threads))
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < a.documents * a.kv_heads; ++number) body(Part(a, number), scratch);
  }
}

}  // namespace
}  // namespace lorakit

#define EXPORTED [[gnu::visibility("default")]]

extern "C" {

// y = weight * x * factor for rows of n, with factor = 1 / sqrt(mean(x²) + epsilon).
EXPORTED void lorakit_rms_norm(const float* x, const float* weight, int64_t rows, int64_t n, double epsilon, float* y,
                               float* factors, int64_t threads) {
#pragma omp parallel for num_threads(lorakit::team(rows * n, threads))
  for (int64_t i = 0; i < rows; ++i) factors[i] = lorakit::normalize(x + i * n, weight, n, epsilon, y + i * n);
}

EXPORTED void lorakit_rms_norm_back(const float* dy, const float* y, const float* weight, const float* factors,
                                    int64_t rows, int64_t n, float* dx, int64_t threads) {
#pragma omp parallel for num_threads(lorakit::team(rows * n, threads))
  for (int64_t i = 0; i < rows; ++i)
    lorakit::normalize_back(dy + i * n, y + i * n, weight, factors[i], n, dx + i * n);
}

// y = silu(gate) * up.
EXPORTED void lorakit_swiglu(const float* gate, const float* up, int64_t count, float* y, int64_t threads) {
  using namespace lorakit;
#pragma omp parallel for num_threads(team(count, threads))
  for (int64_t begin = 0; begin < count; begin += ENTRIES_AT_ONCE)
    gate_all(gate, up, begin, std::min(count, begin + ENTRIES_AT_ONCE), y);
}

EXPORTED void lorakit_swiglu_back(const float* dy, const float* gate, const float* up, int64_t count, float* dgate,
                                  float* dup, int64_t threads) {
  using namespace lorakit;
#pragma omp parallel for num_threads(team(count, threads))
  for (int64_t begin = 0; begin < count; begin += ENTRIES_AT_ONCE)
    gate_all_back(dy, gate, up, begin, std::min(count, begin + ENTRIES_AT_ONCE), dgate, dup);
}

// The losses of rows of n logits, and their derivatives, if `dx` is given.
EXPORTED void lorakit_cross_entropy(const float* x, const int64_t* targets, int64_t rows, int64_t n, float* losses,
                                    float* dx, int64_t threads) {
#pragma omp parallel for num_threads(lorakit::team(rows * n, threads))
  for (int64_t i = 0; i < rows; ++i)
    losses[i] = lorakit::cross_entropy(x + i * n, n, targets[i], dx == nullptr ? nullptr : dx + i * n);
}

EXPORTED void lorakit_add_products(const lorakit::Products* products) { lorakit::add_products(*products); }

EXPORTED void lorakit_add_products_back(const lorakit::Products* products) { lorakit::add_products_back(*products); }

EXPORTED void lorakit_attention(const lorakit::Attention* attention) {
  lorakit::each_part(*attention, [](const auto& part, auto& scratch) { lorakit::attend(part, scratch); });
}

EXPORTED void lorakit_attention_back(const lorakit::Attention* attention) {
  lorakit::each_part(*attention, [](const auto& part, auto& scratch) { lorakit::attend_back(part, scratch); });
}
}
