// The rounds of Philox4x32-10 in vectors of MIXFLOW_LANES 64-bit lanes; included in philox_cpu.cpp
// once for each width of vector, in a namespace of its own, with MIXFLOW_MULTIPLY, the product of
// the lanes' lower halves, in all 64 bits. A processor has this product in one instruction, which
// compilers do not find by themselves; it does not read the upper halves, so nothing clears them.

typedef uint64_t Lanes __attribute__((vector_size(8 * MIXFLOW_LANES)));
typedef uint32_t Halves __attribute__((vector_size(4 * MIXFLOW_LANES)));

inline void philox(const Counter& counter, uint32_t first, int64_t count, Words& out) {
  // Vectors side by side: a round waits for the one before.
  constexpr int kTogether = 2;
  static_assert(kTile % (kTogether * MIXFLOW_LANES) == 0, "the last vectors must fit into the tile");
  const Lanes zero = {};
  const Lanes round_a = zero + kRoundA;
  const Lanes round_b = zero + kRoundB;
  Lanes step;
  for (int lane = 0; lane < MIXFLOW_LANES; ++lane) step[lane] = static_cast<uint64_t>(lane);
  Lanes keys0[10];
  Lanes keys1[10];
  for (uint32_t round = 0; round < 10; ++round) {
    keys0[round] = zero + (counter.key0 + round * kWeylA);
    keys1[round] = zero + (counter.key1 + round * kWeylB);
  }
  for (int64_t i = 0; i < count; i += kTogether * MIXFLOW_LANES) {
    Lanes c[4][kTogether];
#pragma GCC unroll 2
    for (int v = 0; v < kTogether; ++v) {
      c[0][v] = step + (static_cast<uint64_t>(first) + static_cast<uint64_t>(i + v * MIXFLOW_LANES));
      c[1][v] = zero + counter.stream;
      c[2][v] = zero + counter.low;
      c[3][v] = zero + counter.high;
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
      for (int v = 0; v < kTogether; ++v) {
        const Lanes a = MIXFLOW_MULTIPLY(c[0][v], round_a);
        const Lanes b = MIXFLOW_MULTIPLY(c[2][v], round_b);
        c[0][v] = (b >> 32) ^ c[1][v] ^ keys0[round];
        c[1][v] = b;
        c[2][v] = (a >> 32) ^ c[3][v] ^ keys1[round];
        c[3][v] = a;
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kTogether; ++v) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Halves w = __builtin_convertvector(c[k][v], Halves);
        memcpy(out.w[k] + i + v * MIXFLOW_LANES, &w, sizeof(w));
      }
    }
  }
}
