// One step of a decoder of the Llama kind over a ragged batch, each row with the adapter of its request.
//
// The structures are mirrored in decoder.py; all fields are eight bytes wide. Pointers are borrowed. All numbers are float32,
// but for those of the adapters' factors, and row-major, but for the weights and the keys, which are kept in blocks of as
// many columns as a vector has entries.
#pragma once

#include <cstdint>

namespace lorakit {

// A weight (out x in), cut into parts (q, k, v), and each part into blocks: block b holds the weights of WIDTH outputs as
// (in, WIDTH), the last of a part filled up with zeros.
struct Weight {
  const float* blocks;     // (count, in, WIDTH), or null
  const int8_t* codes;     // instead of them: (count, in / 4, WIDTH, 4), `in` filled up to a multiple of 32
  const float* scales;     // (count, in / 32, WIDTH): what a code of each group of 32 inputs is worth
  const float* bias;       // (count, WIDTH), or null
  const int64_t* places;   // (count, 4): its part, its number in the part, its first column of Y, its columns
  int64_t in, count;
};

// A factor as its file has it.
struct Factor {
  const void* entries;
  int64_t kind;  // of number: 0 float32, 1 bfloat16, 2 float16
};

// What an adapter changes at a weight: Y = gain * (X Wᵀ + scale * X Aᵀ Bᵀ) + shift + bias, the product part by part.
struct Patch {
  Factor A[3];         // (rank of the part, in)
  Factor B[3];         // (outputs of the part, its rank)
  double scale[3];
  int64_t ranks[3];    // 0: nothing to add
  int64_t offset[3];   // where a part's short row begins in that of all parts
  int64_t rank;        // their sum
  const float* gain;   // (count, WIDTH), or null
  const float* shift;  // (count, WIDTH), or null
};

// Neighbouring rows with the same adapter; patches: one for each weight (4 a layer, then the head), null for the base.
struct Segment {
  int64_t start, end;
  const Patch* patches;
};

struct Layer {
  Weight qkv, out, gate_up, down;
  const float *input_norm, *post_norm;  // (hidden)
  const float *q_norm, *k_norm;         // (head_dim), or null
};

struct Decoder {
  const Layer* layers;
  Weight head;
  const float* norm;
  float *keys, *values;  // (layers, kv_heads, capacity, head_dim); keys as blocks (capacity / WIDTH, head_dim, WIDTH)
  int64_t n_layers, hidden, heads, kv_heads, head_dim, middle, capacity;
  int64_t gelu;  // the gate: 0 for SiLU, 1 for GELU by tanh
  double epsilon, scale;
};

struct Step {
  float* x;                  // (rows, hidden): embedded tokens; overwritten
  const float *cos, *sin;    // (rows, head_dim)
  const int64_t* pieces;     // (n_pieces, 4): first row, end, tokens before them, first slot of the request's slab
  const int64_t* last;       // (n_last): rows whose logits are wanted
  const Segment* segments;
  const Segment* last_segments;  // the same over `last`
  float* logits;             // (n_last, vocabulary)
  float *normed, *qkv, *seen, *acted, *short_rows;  // (rows, ..) scratch; short_rows has `widest_rank` columns
  float* columns;            // (rows, widest input), for float32
  int8_t* codes;             // (rows, widest input), for int8
  float* code_scales;        // (rows, widest input / 32)
  int32_t* code_sums;        // the same
  int64_t rows, n_pieces, n_last, n_segments, n_last_segments, widest_rank, threads;
};

}  // namespace lorakit
