// Blocks of words in tiles that stay in the first-level cache: the rounds of Philox for a whole
// tile, then plain loops over its words, for the compiler to vectorise.
#include "philox_cpu.h"

#include <math.h>
#include <string.h>

#include "clones.h"

#ifdef MIXFLOW_ONE_LIBRARY_FOR_X86
#include <immintrin.h>
#endif

#define MIXFLOW_INLINE inline __attribute__((always_inline))

namespace mixflow {

namespace {

// Blocks of a tile.
constexpr int64_t kTile = 256;

constexpr uint32_t kRoundA = 0xD2511F53u;
constexpr uint32_t kRoundB = 0xCD9E8D57u;
constexpr uint32_t kWeylA = 0x9E3779B9u;
constexpr uint32_t kWeylB = 0xBB67AE85u;

struct Words {
  alignas(64) uint32_t w[4][kTile];
};

#ifdef MIXFLOW_ONE_LIBRARY_FOR_X86

namespace sse2 {
#define MIXFLOW_LANES 2
#define MIXFLOW_MULTIPLY(a, b) (Lanes) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#include "philox_lanes.h"
#undef MIXFLOW_LANES
#undef MIXFLOW_MULTIPLY
}  // namespace sse2

#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#define MIXFLOW_LANES 4
#define MIXFLOW_MULTIPLY(a, b) (Lanes) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#include "philox_lanes.h"
#undef MIXFLOW_LANES
#undef MIXFLOW_MULTIPLY
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f")
namespace avx512 {
#define MIXFLOW_LANES 8
#define MIXFLOW_MULTIPLY(a, b) (Lanes) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#include "philox_lanes.h"
#undef MIXFLOW_LANES
#undef MIXFLOW_MULTIPLY
}  // namespace avx512
#pragma GCC pop_options

using Philox = void (*)(const Counter&, uint32_t, int64_t, Words&);

Philox widest() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return avx512::philox;
  return __builtin_cpu_supports("avx2") ? avx2::philox : sse2::philox;
}

// The words of the blocks [first, first + count) of a sample, count <= kTile.
void philox(const Counter& counter, uint32_t first, int64_t count, Words& out) {
  static const Philox chosen = widest();
  chosen(counter, first, count, out);
}

#else

uint32_t high_half(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// The words of the blocks [first, first + count) of a sample, count <= kTile.
void philox(const Counter& counter, uint32_t first, int64_t count, Words& out) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t c0 = first + static_cast<uint32_t>(i);
    uint32_t c1 = counter.stream;
    uint32_t c2 = counter.low;
    uint32_t c3 = counter.high;
    uint32_t k0 = counter.key0;
    uint32_t k1 = counter.key1;
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = high_half(kRoundA, c0);
      const uint32_t high1 = high_half(kRoundB, c2);
      const uint32_t low0 = kRoundA * c0;
      c0 = high1 ^ c1 ^ k0;
      c1 = kRoundB * c2;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += kWeylA;
      k1 += kWeylB;
    }
    out.w[0][i] = c0;
    out.w[1][i] = c1;
    out.w[2][i] = c2;
    out.w[3][i] = c3;
  }
}

#endif

MIXFLOW_INLINE float unit_open(uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
}

MIXFLOW_INLINE float quarter_angle(uint32_t word) {
  const float turns = (static_cast<float>(word >> 9 & 0x3FFFFFu) + 0.5f) * 0x1p-23f - 0.25f;
  return turns * static_cast<float>(2.0 * M_PI);
}

MIXFLOW_INLINE float with_sign(float x, uint32_t sign) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits ^= sign;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

MIXFLOW_CLONES void store_words(const Words& of, int64_t count, int64_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[4 * i] = of.w[0][i];
    out[4 * i + 1] = of.w[1][i];
    out[4 * i + 2] = of.w[2][i];
    out[4 * i + 3] = of.w[3][i];
  }
}

MIXFLOW_CLONES void store_uniforms(const Words& of, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[4 * i] = unit_open(of.w[0][i]);
    out[4 * i + 1] = unit_open(of.w[1][i]);
    out[4 * i + 2] = unit_open(of.w[2][i]);
    out[4 * i + 3] = unit_open(of.w[3][i]);
  }
}

MIXFLOW_CLONES void store_pairs(const uint32_t* __restrict radius_word,
                                const uint32_t* __restrict angle_word, int64_t count,
                                float* __restrict radius, float* __restrict angle,
                                uint32_t* __restrict sign) {
  for (int64_t i = 0; i < count; ++i) {
    radius[i] = static_cast<float>(radius_word[i]) * 0x1p-32f + 0x1p-33f;
    angle[i] = quarter_angle(angle_word[i]);
    sign[i] = angle_word[i] & 0x80000000u;
  }
}

template <typename Store>
MIXFLOW_INLINE void for_tiles(const Counter& counter, uint32_t first, int64_t count,
                              const Store& store) {
  Words tile;
  for (int64_t i = 0; i < count; i += kTile) {
    const int64_t n = count - i < kTile ? count - i : kTile;
    philox(counter, first + static_cast<uint32_t>(i), n, tile);
    store(tile, i, n);
  }
}

}  // namespace

void words(const Counter& counter, uint32_t first, int64_t count, int64_t* out) {
  for_tiles(counter, first, count,
            [&](const Words& tile, int64_t i, int64_t n) { store_words(tile, n, out + 4 * i); });
}

void uniforms(const Counter& counter, uint32_t first, int64_t count, float* out) {
  for_tiles(counter, first, count,
            [&](const Words& tile, int64_t i, int64_t n) { store_uniforms(tile, n, out + 4 * i); });
}

void pairs(const Counter& counter, uint32_t first, const Pairs& out) {
  for_tiles(counter, first, out.count, [&](const Words& tile, int64_t i, int64_t n) {
    store_pairs(tile.w[0], tile.w[1], n, out.radius + i, out.angle + i, out.sign + i);
    i += out.count;
    store_pairs(tile.w[2], tile.w[3], n, out.radius + i, out.angle + i, out.sign + i);
  });
}

MIXFLOW_CLONES void minus_two(float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= -2.0f;
}

MIXFLOW_CLONES void normals(const Pairs& of, int64_t begin, int64_t n, float* __restrict out) {
  const float* __restrict const radius = of.radius + begin;
  const float* __restrict const sine = of.sine + begin;
  const float* __restrict const cosine = of.cosine + begin;
  const uint32_t* __restrict const sign = of.sign + begin;
  const int64_t second = of.count;
  for (int64_t i = 0; i < n; ++i) {
    const float r0 = with_sign(radius[i], sign[i]);
    const float r1 = with_sign(radius[second + i], sign[second + i]);
    out[4 * i] = -r0 * sine[i];
    out[4 * i + 1] = r0 * cosine[i];
    out[4 * i + 2] = -r1 * sine[second + i];
    out[4 * i + 3] = r1 * cosine[second + i];
  }
}

}  // namespace mixflow
