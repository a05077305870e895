// torch.ops.mixflow_fast.philox_words, philox_uniform and philox_normal: random numbers as functions
// of (seed, stream, position, element), on the CPU. Formulas: kernels/philox.py.
//
// Logarithm, root, sine and cosine are PyTorch's own, called for one piece after another: which ones
// a PyTorch has depends on how it was built and on the processor, and the numbers must have the bits
// of the PyTorch lines everywhere. What is around them is exact or rounded in one way.
#include <ATen/CPUFunctions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <string>

#include "philox_cpu.h"

namespace {

using at::Tensor;

// Blocks, of four elements each, that are worth another thread, and that are made at a time: what
// they need meanwhile stays in the second-level cache.
constexpr int64_t kGrain = 4096;
constexpr int64_t kPiece = 4096;
// A block's number is a 32-bit word of the counter.
constexpr int64_t kMostElements = int64_t{1} << 34;

void check(const char* op, const Tensor& seed, const Tensor& positions, int64_t stream) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.dim() == 0, op,
                    ": seed must be a () Long tensor (philox.seed_tensor), got shape ",
                    seed.sym_sizes(), " and dtype ", seed.scalar_type());
  TORCH_CHECK_VALUE(positions.scalar_type() == at::kLong && positions.dim() == 1, op,
                    ": positions must be a (B,) Long tensor, one for each sample, got shape ",
                    positions.sym_sizes(), " and dtype ", positions.scalar_type());
  TORCH_CHECK_VALUE(seed.device() == positions.device(), op,
                    ": seed must be on the positions' device ", positions.device(), ", got ",
                    seed.device());
  TORCH_CHECK_VALUE(0 <= stream && stream < int64_t{1} << 32, op,
                    ": stream must be in [0, 2**32), got ", stream);
}

// What comes of some blocks of one sample: `fill(counter, first block, blocks, out)` writes four
// elements for each. The last block of a sample may reach over its end, so it goes through memory of
// its own.
template <typename T, typename Fill>
void fill_blocks(const mixflow::Counter& counter, int64_t first, int64_t blocks, int64_t numel,
                 T* sample, const Fill& fill) {
  const int64_t whole = std::min(blocks, numel / 4 - first);
  if (whole > 0) fill(counter, static_cast<uint32_t>(first), whole, sample + 4 * first);
  if (whole == blocks) return;
  T last[4];
  fill(counter, static_cast<uint32_t>(first + whole), 1, last);
  std::copy(last, last + numel % 4, sample + 4 * (first + whole));
}

struct Draw {
  int64_t seed;
  uint32_t stream;
  const int64_t* positions;
  int64_t numel;

  int64_t blocks_each() const { return (numel + 3) / 4; }

  // Calls `part(counter, first block, blocks, sample)` for the samples that the blocks
  // [begin, end) of all samples, one after the other, belong to.
  template <typename Part>
  void for_samples(int64_t begin, int64_t end, const Part& part) const {
    while (begin < end) {
      const int64_t sample = begin / blocks_each();
      const int64_t first = begin - sample * blocks_each();
      const int64_t blocks = std::min(blocks_each() - first, end - begin);
      part(mixflow::make_counter(seed, stream, positions[sample]), first, blocks, sample);
      begin += blocks;
    }
  }
};

struct Inputs {
  Tensor positions;
  Draw draw;
  Tensor out;
};

Inputs prepare(const char* op, const Tensor& seed, const Tensor& positions, int64_t stream,
               int64_t numel, at::ScalarType dtype) {
  check(op, seed, positions, stream);
  TORCH_CHECK_VALUE(0 <= numel && numel <= kMostElements, op,
                    ": numel must be in [0, 2**34], got ", numel);
  Tensor held = positions.contiguous();
  const Draw draw{*seed.const_data_ptr<int64_t>(), static_cast<uint32_t>(stream),
                  held.const_data_ptr<int64_t>(), numel};
  Tensor out = at::empty({held.numel(), numel}, held.options().dtype(dtype));
  return {std::move(held), draw, std::move(out)};
}

// Numbers that are functions of one word.
template <typename T, typename Fill>
Tensor draw_words(const char* op, const Tensor& seed, const Tensor& positions, int64_t stream,
                  int64_t numel, at::ScalarType dtype, const Fill& fill) {
  const Inputs inputs = prepare(op, seed, positions, stream, numel, dtype);
  T* const out = inputs.out.template mutable_data_ptr<T>();
  const int64_t blocks = inputs.positions.numel() * inputs.draw.blocks_each();
  at::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    inputs.draw.for_samples(
        begin, end,
        [&](const mixflow::Counter& counter, int64_t first, int64_t count, int64_t sample) {
          fill_blocks(counter, first, count, numel, out + sample * numel, fill);
        });
  });
  return inputs.out;
}

Tensor philox_words(const Tensor& seed, const Tensor& positions, int64_t stream, int64_t numel) {
  return draw_words<int64_t>("philox_words", seed, positions, stream, numel, at::kLong,
                             mixflow::words);
}

Tensor philox_uniform(const Tensor& seed, const Tensor& positions, int64_t stream, int64_t numel) {
  return draw_words<float>("philox_uniform", seed, positions, stream, numel, at::kFloat,
                           mixflow::uniforms);
}

// What a piece of kPiece blocks needs.
struct Workspace {
  alignas(64) float radius[2 * kPiece];
  alignas(64) float angle[2 * kPiece];
  alignas(64) float sine[2 * kPiece];
  alignas(64) float cosine[2 * kPiece];
  alignas(64) uint32_t sign[2 * kPiece];

  // Those of `count` blocks after `done` pairs.
  mixflow::Pairs pairs(int64_t done, int64_t count) {
    return {radius + done, angle + done, sine + done, cosine + done, sign + done, count};
  }
};

// No dispatcher: threads of at::parallel_for have none of the caller's state.
void functions_of_pairs(Workspace& space, int64_t n) {
  const auto array = [n](float* data) { return at::from_blob(data, {n}, at::kFloat); };
  Tensor radius = array(space.radius);
  at::cpu::log_(radius);
  mixflow::minus_two(space.radius, n);
  at::cpu::sqrt_(radius);
  const Tensor angle = array(space.angle);
  Tensor sine = array(space.sine);
  Tensor cosine = array(space.cosine);
  at::cpu::sin_out(sine, angle);
  at::cpu::cos_out(cosine, angle);
}

// The normals of the blocks [begin, end) of all samples, at most kPiece.
void normal_piece(const Draw& draw, int64_t begin, int64_t end, Workspace& space, float* out) {
  int64_t done = 0;
  draw.for_samples(begin, end,
                   [&](const mixflow::Counter& counter, int64_t first, int64_t count, int64_t) {
                     const auto block = static_cast<uint32_t>(first);
                     mixflow::pairs(counter, block, space.pairs(done, count));
                     done += 2 * count;
                   });
  functions_of_pairs(space, done);
  done = 0;
  draw.for_samples(
      begin, end,
      [&](const mixflow::Counter& counter, int64_t first, int64_t count, int64_t sample) {
        const mixflow::Pairs pairs = space.pairs(done, count);
        const auto fill = [&](const mixflow::Counter&, uint32_t block, int64_t n, float* to) {
          mixflow::normals(pairs, block - first, n, to);
        };
        fill_blocks(counter, first, count, draw.numel, out + sample * draw.numel, fill);
        done += 2 * count;
      });
}

Tensor philox_normal(const Tensor& seed, const Tensor& positions, int64_t stream, int64_t numel) {
  const Inputs inputs = prepare("philox_normal", seed, positions, stream, numel, at::kFloat);
  float* const out = inputs.out.mutable_data_ptr<float>();
  const int64_t blocks = inputs.positions.numel() * inputs.draw.blocks_each();
  at::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Workspace> space(new Workspace);
    for (; begin < end; begin += kPiece) {
      normal_piece(inputs.draw, begin, std::min(begin + kPiece, end), *space, out);
    }
  });
  return inputs.out;
}

template <at::ScalarType dtype>
Tensor philox_meta(const Tensor& seed, const Tensor& positions, int64_t stream,
                   c10::SymInt numel) {
  check("philox", seed, positions, stream);
  TORCH_CHECK_VALUE(numel >= 0 && numel <= kMostElements,
                    "philox: numel must be in [0, 2**34], got ", numel);
  return at::empty_symint({positions.sym_size(0), std::move(numel)},
                          positions.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mixflow_fast, library) {
  for (const char* const name : {"philox_words", "philox_uniform", "philox_normal"}) {
    const std::string arguments = "(Tensor seed, Tensor positions, int stream, SymInt numel)";
    library.def((name + arguments + " -> Tensor").c_str(), {at::Tag::pt2_compliant_tag});
  }
}

TORCH_LIBRARY_IMPL(mixflow_fast, CPU, library) {
  library.impl("philox_words", philox_words);
  library.impl("philox_uniform", philox_uniform);
  library.impl("philox_normal", philox_normal);
}

TORCH_LIBRARY_IMPL(mixflow_fast, Meta, library) {
  library.impl("philox_words", philox_meta<at::kLong>);
  library.impl("philox_uniform", philox_meta<at::kFloat>);
  library.impl("philox_normal", philox_meta<at::kFloat>);
}
