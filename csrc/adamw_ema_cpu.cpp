// The CPU's loops: plain ones over the element's update, for the compiler to vectorise. Blocks go
// through AdamW, the averages and the copy in turn while they are in the cache, so that main memory
// is read and written once.
#include "adamw_ema_cpu.h"

#include "clones.h"

namespace mixflow {

template <typename G>
MIXFLOW_INLINE void adamw_loop(float* __restrict w, const G* __restrict g, float* __restrict m,
                               float* __restrict v, int64_t n, const AdamW& adamw_of_step,
                               float factor) {
  const AdamW s = adamw_of_step;
  for (int64_t i = 0; i < n; ++i) {
    float first = m[i];
    float second = v[i];
    w[i] = adamw(w[i], factor * to_float(g[i]), first, second, s);
    m[i] = first;
    v[i] = second;
  }
}

MIXFLOW_CLONES void adamw_float(float* __restrict w, const float* __restrict g,
                                float* __restrict m, float* __restrict v, int64_t n,
                                const AdamW& s, float factor) {
  adamw_loop(w, g, m, v, n, s, factor);
}

MIXFLOW_CLONES void adamw_bfloat16(float* __restrict w, const uint16_t* __restrict g,
                                   float* __restrict m, float* __restrict v, int64_t n,
                                   const AdamW& s, float factor) {
  adamw_loop(w, g, m, v, n, s, factor);
}

MIXFLOW_CLONES void average(float* __restrict e, const float* __restrict w, int64_t n,
                            float weight) {
  for (int64_t i = 0; i < n; ++i) e[i] = lerp(e[i], w[i], weight);
}

MIXFLOW_CLONES void copy_bfloat16(uint16_t* __restrict copy, const float* __restrict w,
                                  int64_t n) {
  for (int64_t i = 0; i < n; ++i) copy[i] = to_bfloat16(w[i]);
}

void update_cpu(const Run& run, int64_t begin, int64_t end, const AdamW& s, float factor) {
  for (int64_t i = begin; i < end; i += kCpuBlock) {
    const int64_t n = end - i < kCpuBlock ? end - i : kCpuBlock;
    if (run.bfloat16_gradients) {
      adamw_bfloat16(run.w + i, static_cast<const uint16_t*>(run.g) + i, run.m + i, run.v + i, n,
                     s, factor);
    } else {
      adamw_float(run.w + i, static_cast<const float*>(run.g) + i, run.m + i, run.v + i, n, s,
                  factor);
    }
    for (int k = 0; k < run.emas_each; ++k) {
      average(run.emas[k] + i, run.w + i, n, run.ema_weights[k]);
    }
    if (run.copy != nullptr) copy_bfloat16(run.copy + i, run.w + i, n);
  }
}

}  // namespace mixflow
