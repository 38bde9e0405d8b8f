// What a training step of a decoder of the Llama kind does between its matrix products, each with its derivative.
//
// The structures are mirrored in training.py; all fields are eight bytes wide. Pointers are borrowed. float32 throughout,
// and row-major. What is computed for a row, or for a document, never depends on what lies beside it, nor on the threads.
#pragma once

#include <cstdint>

namespace lorakit {

// Attention of documents that lie end to end, each of them causal and by itself, with keys and queries turned by their
// place before. Heads of queries that follow each other share a head of keys.
struct Attention {
  const float *q, *k, *v;      // (tokens, heads * n), (tokens, kv_heads * n) twice: not turned yet
  const float *cos, *sin;      // (tokens, n)
  const int64_t* borders;      // (documents + 1): the first token of each, and the end
  float* y;                    // (tokens, heads * n); backward it is read
  float* logs;                 // (tokens, heads): logarithms of the sums of exponentials; backward they are read
  const float* dy;             // backward: (tokens, heads * n)
  float *dq, *dk, *dv;         // backward: as q, k, v
  int64_t documents, heads, kv_heads, n, threads;
  double scale;
};

// One of several layers that read the same input, and the low-rank change of its output: y += scale * x Aᵀ Bᵀ.
struct Product {
  const float* B;        // transposed: (r, out)
  float* y;              // (tokens, out): forward it is added to
  float* dy;             // backward: (tokens, out)
  float* dB;             // backward: transposed, (r, out)
  int64_t r, out;
  double scale;
};

// All of them. Where `gated` (`dgated`) is given there are two, and what goes on is silu(y of the first) * y of the second:
// backward their `dy` are made here.
struct Products {
  const float *x, *A;    // (tokens, n), and the factors of all below each other: (r, n); backward x may be null
  const Product* each;
  float* h;              // (tokens, r): scale * x Aᵀ; backward it is read
  float* gated;          // forward, if not null: (tokens, out)
  const float* dgated;   // backward, if not null: (tokens, out)
  float* dx;             // backward, if not null: (tokens, n), gets the low-rank part
  float* dA;             // backward, if x is not null: (r, n)
  float* dh;             // backward, if not null: (tokens, r), what of h goes on to x and A
  const float* next_dh;  // backward, if not null: that of a layer that reads what went on, (tokens, next_r)
  float* next_dA;        // and its derivative: (next_r, out)
  int64_t tokens, n, r, count, threads, next_r;
};

}  // namespace lorakit
