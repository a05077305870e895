// Philox4x32-10 (Salmon et al., SC 2011) on a CPU, and what becomes of its words, elementwise.
//
//     key     = (seed low 32 bits, seed high 32 bits)
//     counter = (block, stream, position low 32 bits, position high 32 bits)
//
// A block yields four words, those of the elements 4 block to 4 block + 3 of a sample. Formulas and
// their reasons stand in kernels/philox.py, whose PyTorch lines have the same bits: compiled without
// contraction of multiply and add. Includes nothing of PyTorch.
#pragma once

#include <stdint.h>

namespace mixflow {

// What the blocks of one sample have in common.
struct Counter {
  uint32_t key0, key1;
  uint32_t stream, low, high;
};

inline Counter make_counter(int64_t seed, uint32_t stream, int64_t position) {
  const auto s = static_cast<uint64_t>(seed);
  const auto p = static_cast<uint64_t>(position);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), stream,
          static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32)};
}

// The blocks [first, first + count) write 4 count elements.
void words(const Counter& counter, uint32_t first, int64_t count, int64_t* out);

// (k + 1/2) 2^-23 of the upper 23 bits k of each word.
void uniforms(const Counter& counter, uint32_t first, int64_t count, float* out);

// Box-Muller in three parts, between which the caller takes functions of whole arrays. A block has
// two pairs of words: pair k of block i is element k count + i of the arrays, which hold 2 count.
struct Pairs {
  // In (0, 1], for the logarithm under the radius' root; then the radius.
  float* radius;
  // In [-pi / 2, pi / 2], and its sine and cosine.
  float* angle;
  float* sine;
  float* cosine;
  // Of both normals: 0 or the sign bit of a float.
  uint32_t* sign;
  int64_t count;
};

// Writes radius, angle and sign of the blocks [first, first + count).
void pairs(const Counter& counter, uint32_t first, const Pairs& out);

// x = -2 x.
void minus_two(float* x, int64_t n);

// The 4 n normals of the blocks [begin, begin + n) of the arrays.
void normals(const Pairs& of, int64_t begin, int64_t n, float* out);

}  // namespace mixflow
