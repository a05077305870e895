// Many tensors in one launch: a table that travels by value in the kernel's arguments, and the walk
// of one thread through it. Plain C++, so that a compiler without CUDA can build and test it.
//
// Nothing is copied to the device beside the arguments, so there is no host memory to keep alive
// and a launch can be captured into a CUDA graph. What a graph replays are the table's numbers, so
// a step that is captured takes its constants from device memory, as all take factor and norm.
#pragma once

#include "adamw_ema.h"

namespace mixflow {

// Elements of one thread block.
constexpr int64_t kChunk = 4096;
constexpr int kThreads = 256;
constexpr int kMaxRows = 48;
constexpr int kMaxPointers = 384;
constexpr int64_t kMaxBlocks = 2147483647;
// Pointers of a row before those of its averages.
enum Role { kWeight, kGradient, kFirst, kSecond, kCopy, kRoles };

struct Table {
  // rows x (kRoles + emas); kCopy is null where no bfloat16 copy is wanted.
  void* pointers[kMaxPointers];
  int64_t sizes[kMaxRows];
  // Block that a row starts with.
  int32_t first_block[kMaxRows];
  Constants constants;
  // In device memory, and used instead of `constants`; null for a step with numbers of the host.
  const Constants* stored;
  // Of the gradients, in device memory; null for 1.
  const float* factor;
  // Of the whole gradient, in device memory: nothing is written where it is infinite or NaN. Null
  // for a step that is always made.
  const float* norm;
  // Bit i: every pointer of row i allows access to four elements at once.
  uint64_t aligned;
  int32_t rows;
  int32_t blocks;
  int32_t emas;
};

// What a kernel's arguments may hold on every GPU.
static_assert(sizeof(Table) <= 4096, "the table must fit in a kernel's arguments");
static_assert(kMaxRows <= 64, "one bit of `aligned` for each row");
static_assert(kRoles + kMaxEmas <= kMaxPointers, "a row must fit");

struct alignas(16) Float4 {
  float x[4];
};
struct alignas(8) BFloat4 {
  uint16_t x[4];
};

MIXFLOW_INLINE Float4 load4(const float* p) { return *reinterpret_cast<const Float4*>(p); }

MIXFLOW_INLINE Float4 load4(const uint16_t* p) {
  const BFloat4 bits = *reinterpret_cast<const BFloat4*>(p);
  return Float4{{to_float(bits.x[0]), to_float(bits.x[1]), to_float(bits.x[2]),
                 to_float(bits.x[3])}};
}

MIXFLOW_INLINE void store4(float* p, const Float4& x) { *reinterpret_cast<Float4*>(p) = x; }

MIXFLOW_INLINE void store4(uint16_t* p, const Float4& x) {
  *reinterpret_cast<BFloat4*>(p) = BFloat4{
      {to_bfloat16(x.x[0]), to_bfloat16(x.x[1]), to_bfloat16(x.x[2]), to_bfloat16(x.x[3])}};
}

// One thread's part of one block. G: float, or uint16_t for bfloat16. K: the number of averages
// where it is known when this is compiled, else -1. kStored: whether `table.stored` is given; known
// then, too, because constants among the arguments take no registers.
template <typename G, int K, bool kStored>
MIXFLOW_INLINE void update_chunk(const Table& table, int32_t block, int thread, int threads) {
  // The same number for every thread of the launch, so that a step is made whole or not at all.
  if (table.norm != nullptr && !is_finite(*table.norm)) return;
  int row = 0;
  for (int stride = 32; stride > 0; stride /= 2) {
    if (row + stride < table.rows && table.first_block[row + stride] <= block) row += stride;
  }
  const int emas = K < 0 ? table.emas : K;
  const int first = row * (kRoles + emas);
  float* const w_ptr = static_cast<float*>(table.pointers[first + kWeight]);
  const G* const g_ptr = static_cast<const G*>(table.pointers[first + kGradient]);
  float* const m_ptr = static_cast<float*>(table.pointers[first + kFirst]);
  float* const v_ptr = static_cast<float*>(table.pointers[first + kSecond]);
  uint16_t* const copy_ptr = static_cast<uint16_t*>(table.pointers[first + kCopy]);
  const float factor = table.factor == nullptr ? 1.0f : *table.factor;
  const Constants& constants = kStored ? *table.stored : table.constants;
  const AdamW s = constants.adamw;

  const int64_t begin = (block - table.first_block[row]) * kChunk;
  const int64_t size = table.sizes[row];
  const int64_t end = size - begin < kChunk ? size : begin + kChunk;
  // Chunks start at multiples of four elements.
  const int64_t whole = (table.aligned >> row) & 1 ? begin + (end - begin) / 4 * 4 : begin;

  for (int64_t i = begin + 4 * thread; i < whole; i += 4 * threads) {
    Float4 w = load4(w_ptr + i);
    const Float4 g = load4(g_ptr + i);
    Float4 m = load4(m_ptr + i);
    Float4 v = load4(v_ptr + i);
    // Read before they are needed: the loads of a known number of averages overlap the others.
    Float4 e[K > 0 ? K : 1];
    if (K > 0) {
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < K; ++k) e[k] = load4(static_cast<float*>(table.pointers[first + kRoles + k]) + i);
    }
    for (int j = 0; j < 4; ++j) {
      w.x[j] = adamw(w.x[j], factor * g.x[j], m.x[j], v.x[j], s);
    }
    store4(w_ptr + i, w);
    store4(m_ptr + i, m);
    store4(v_ptr + i, v);
    if (copy_ptr != nullptr) store4(copy_ptr + i, w);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < emas; ++k) {
      float* const e_ptr = static_cast<float*>(table.pointers[first + kRoles + k]);
      Float4 average = K > 0 ? e[K > 0 ? k : 0] : load4(e_ptr + i);
      const float weight = constants.ema_weights[k];
      for (int j = 0; j < 4; ++j) average.x[j] = lerp(average.x[j], w.x[j], weight);
      store4(e_ptr + i, average);
    }
  }
  for (int64_t i = whole + thread; i < end; i += threads) {
    const float w = adamw(w_ptr[i], factor * to_float(g_ptr[i]), m_ptr[i], v_ptr[i], s);
    w_ptr[i] = w;
    if (copy_ptr != nullptr) copy_ptr[i] = to_bfloat16(w);
    for (int k = 0; k < emas; ++k) {
      float* const e_ptr = static_cast<float*>(table.pointers[first + kRoles + k]);
      e_ptr[i] = lerp(e_ptr[i], w, constants.ema_weights[k]);
    }
  }
}

// Tensors by role; `emas[k * count + i]` is average k of tensor i, `copies` is null or one each.
struct Tensors {
  int64_t count;
  const int64_t* sizes;
  void* const* weights;
  void* const* gradients;
  void* const* firsts;
  void* const* seconds;
  void* const* emas;
  void* const* copies;
  int emas_each;
  bool bfloat16_gradients;
};

// Calls `launch(table)` for as many tables as the tensors take.
template <typename Launch>
void for_each_table(const Tensors& tensors, const Constants& constants, const Constants* stored,
                    const float* factor, const float* norm, const Launch& launch) {
  const int width = kRoles + tensors.emas_each;
  const int most = kMaxPointers / width < kMaxRows ? kMaxPointers / width : kMaxRows;
  Table table = {};
  table.constants = constants;
  table.stored = stored;
  table.factor = factor;
  table.norm = norm;
  table.emas = tensors.emas_each;
  int64_t blocks = 0;
  const auto flush = [&] {
    table.blocks = static_cast<int32_t>(blocks);
    if (table.rows > 0) launch(table);
    table.rows = 0;
    table.aligned = 0;
    blocks = 0;
  };
  for (int64_t i = 0; i < tensors.count; ++i) {
    if (tensors.sizes[i] == 0) continue;
    const int64_t own = (tensors.sizes[i] + kChunk - 1) / kChunk;
    if (table.rows == most || blocks + own > kMaxBlocks) flush();
    void** const row = table.pointers + table.rows * width;
    row[kWeight] = tensors.weights[i];
    row[kGradient] = tensors.gradients[i];
    row[kFirst] = tensors.firsts[i];
    row[kSecond] = tensors.seconds[i];
    row[kCopy] = tensors.copies == nullptr ? nullptr : tensors.copies[i];
    uintptr_t address = reinterpret_cast<uintptr_t>(row[kWeight]) |
                        reinterpret_cast<uintptr_t>(row[kFirst]) |
                        reinterpret_cast<uintptr_t>(row[kSecond]);
    for (int k = 0; k < tensors.emas_each; ++k) {
      row[kRoles + k] = tensors.emas[k * tensors.count + i];
      address |= reinterpret_cast<uintptr_t>(row[kRoles + k]);
    }
    const uintptr_t gradient = reinterpret_cast<uintptr_t>(row[kGradient]);
    // Four bfloat16 are half as wide: an address of 8 will do.
    address |= tensors.bfloat16_gradients ? 2 * gradient : gradient;
    address |= 2 * reinterpret_cast<uintptr_t>(row[kCopy]);
    if (address % 16 == 0) table.aligned |= uint64_t{1} << table.rows;
    table.sizes[table.rows] = tensors.sizes[i];
    table.first_block[table.rows] = static_cast<int32_t>(blocks);
    blocks += own;
    ++table.rows;
  }
  flush();
}

}  // namespace mixflow

// In adamw_ema_cuda.cu. Returns null, or what the launch failed with; does not wait.
extern "C" const char* mixflow_adamw_ema_cuda(const mixflow::Table* table, int bfloat16_gradients,
                                              void* stream);

// Likewise: writes constants to device memory. They travel in the launch's arguments, so the caller
// may change its own at once, and steps that are under way have read theirs before.
extern "C" const char* mixflow_store_constants_cuda(const mixflow::Constants* constants,
                                                    float* stored, void* stream);
