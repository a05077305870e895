// AdamW and exponential moving averages of the weights: the update of one element.
//
//     m = m + (1 - beta1) (s g - m)            v = beta2 v + (1 - beta2) (s g)^2
//     w = w - lr wd w - lr / (1 - beta1^k) m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
//     e = e + (1 - decay) (w - e)              for each average
//
// g is the gradient, s the factor of clipping or loss scaling, k the number of this step from 1 on.
// Decoupled weight decay: arXiv 1711.05101. All in float32; what does not depend on the element is
// computed once, in double. Compiled without contraction of multiply and add, so that a vector's
// lanes, a remainder's scalars, the CPU and the GPU all round alike.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define MIXFLOW_INLINE __host__ __device__ __forceinline__
#else
#define MIXFLOW_INLINE inline __attribute__((always_inline))
#endif

namespace mixflow {

// The most averages that one call updates.
constexpr int kMaxEmas = 16;

struct AdamW {
  float first_weight;   // 1 - beta1
  float beta2;
  float second_weight;  // 1 - beta2
  float root_scale;     // 1 / sqrt(1 - beta2^k)
  float eps;
  float decay;          // lr * weight_decay
  float step_size;      // lr / (1 - beta1^k)
};

// What a step needs besides tensors. All of it is float, so that a tensor of kConstants can hold it.
struct Constants {
  AdamW adamw;
  float ema_weights[kMaxEmas];  // 1 - decay of each average
};

constexpr int kConstants = sizeof(Constants) / sizeof(float);

inline AdamW make_adamw(
    double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  const double k = static_cast<double>(step);
  AdamW s;
  s.first_weight = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.second_weight = static_cast<float>(1.0 - beta2);
  s.root_scale = static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, k)));
  s.eps = static_cast<float>(eps);
  s.decay = static_cast<float>(lr * weight_decay);
  s.step_size = static_cast<float>(lr / (1.0 - pow(beta1, k)));
  return s;
}

// Without math.h's classification, which nvcc and the CPU's compilers spell differently.
MIXFLOW_INLINE bool is_finite(float x) { return x - x == 0.0f; }

// From `a` towards `b`. Either form is exact at its own end of `weight`; as PyTorch's lerp.
MIXFLOW_INLINE float lerp(float a, float b, float weight) {
  return weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
}

// Returns the new weight; `g` is scaled already.
MIXFLOW_INLINE float adamw(float w, float g, float& m, float& v, const AdamW& s) {
  m = lerp(m, g, s.first_weight);
  v = s.beta2 * v + s.second_weight * g * g;
  const float denominator = sqrtf(v) * s.root_scale + s.eps;
  return w - s.decay * w - s.step_size * (m / denominator);
}

MIXFLOW_INLINE float to_float(float x) { return x; }

// bfloat16 as its bits.
MIXFLOW_INLINE float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &wide, sizeof(x));
  return x;
}

// To nearest, ties to even; NaN stays NaN.
MIXFLOW_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

}  // namespace mixflow
