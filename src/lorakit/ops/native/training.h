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

}  // namespace lorakit
