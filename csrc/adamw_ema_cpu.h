// A run of elements of one tensor on one CPU thread. Includes nothing of PyTorch.
#pragma once

#include "adamw_ema.h"

namespace mixflow {

// Elements that stay in the first-level cache between their passes: weights, moments, averages.
constexpr int64_t kCpuBlock = 1024;

struct Run {
  float* w;
  // float, or uint16_t where `bfloat16_gradients`.
  const void* g;
  float* m;
  float* v;
  // Null, or where the weights go as bfloat16.
  uint16_t* copy;
  float* const* emas;
  const float* ema_weights;
  int emas_each;
  bool bfloat16_gradients;
};

// Updates the elements [begin, end). Which run an element is in does not change its bits.
void update_cpu(const Run& run, int64_t begin, int64_t end, const AdamW& adamw, float factor);

}  // namespace mixflow
