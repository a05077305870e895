// torch.ops.mixflow_fast.adamw_ema_ and its two halves for a step that is captured: what they take,
// what they refuse, and who computes them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "adamw_ema_cpu.h"

#ifdef MIXFLOW_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "adamw_ema_table.h"
#endif

// Written by the build (mixflow_fast/extension.py).
#if __has_include("mixflow_build_key.h")
#include "mixflow_build_key.h"
#else
#define MIXFLOW_BUILD_KEY "unknown"
#endif

// Found in the file's bytes before the library is loaded: another PyTorch's would not fit.
extern "C" __attribute__((used, visibility("default"))) const char mixflow_fast_build_key[] =
    "mixflow_fast-build-key:" MIXFLOW_BUILD_KEY ";";

namespace {

using at::Tensor;
using at::TensorList;

// Elements that are worth another thread.
constexpr int64_t kGrain = 32 * mixflow::kCpuBlock;

struct Arguments {
  TensorList params, grads, exp_avgs, exp_avg_sqs, emas, copies;
  const std::optional<Tensor>& grad_scale;
  const std::optional<Tensor>& grad_norm;
  mixflow::Constants constants;
  // Where the parameters are; used instead of `constants` where it is given.
  std::optional<Tensor> stored;

  int64_t count() const { return static_cast<int64_t>(params.size()); }
  int emas_each() const { return static_cast<int>(emas.size() / params.size()); }
  bool bfloat16_gradients() const { return grads[0].scalar_type() == at::kBFloat16; }
};

void check_list(const char* name, TensorList list, size_t expected, const char* meaning) {
  TORCH_CHECK_VALUE(list.size() == expected, "adamw_ema_: ", name, " must hold ", expected,
                    " tensors (", meaning, "), got ", list.size());
}

void check_tensor(const char* name, size_t index, const Tensor& tensor, at::ScalarType dtype,
                  const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, "adamw_ema_: ", name, "[", index, "] must be ",
                    dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "adamw_ema_: ", name, "[", index,
                    "] must be on ", like.device(), " like the parameters, got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), "adamw_ema_: ", name, "[", index,
                    "] must have its parameter's shape ", like.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "adamw_ema_: ", name, "[", index,
                    "] must be contiguous, got shape ", tensor.sizes(), " with strides ",
                    tensor.strides(), ": call .contiguous() on it");
}

void check_number(const char* name, double value, double low, double high) {
  TORCH_CHECK_VALUE(low <= value && value < high, "adamw_ema_: ", name, " must be in [", low, ", ",
                    high, "), got ", value);
}

// A number that is read where the parameters are.
void check_scalar(const char* name, const std::optional<Tensor>& scalar, TensorList params) {
  if (!scalar.has_value() || params.empty()) return;
  TORCH_CHECK_VALUE(scalar->scalar_type() == at::kFloat && scalar->numel() == 1 &&
                        scalar->device() == params[0].device(),
                    "adamw_ema_: ", name, " must be one Float on ", params[0].device(), ", got ",
                    scalar->numel(), " of ", scalar->scalar_type(), " on ", scalar->device());
}

struct Role {
  const char* name;
  TensorList list;
  bool written;
};

// Where a tensor lies in memory, and which it is.
struct Extent {
  uintptr_t begin, end;
  const Role* role;
  size_t index;
};

Extent extent_of(const Role& role, size_t index) {
  const Tensor& tensor = role.list[index];
  // Asked for as what is written, so that memory that is shared until then is copied.
  const void* const data = role.written ? tensor.mutable_data_ptr() : tensor.const_data_ptr();
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + tensor.nbytes(), &role, index};
}

// What is written may be no other tensor's memory: one would be computed from half of the other.
// Gradients are only read, and may share theirs.
void check_apart(const std::vector<Role>& roles) {
  std::vector<Extent> extents;
  for (const Role& role : roles) {
    for (const size_t i : c10::irange(role.list.size())) {
      const Tensor& tensor = role.list[i];
      if (tensor.numel() != 0 && !tensor.is_meta()) extents.push_back(extent_of(role, i));
    }
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  // Those that reach furthest so far.
  const Extent* last = nullptr;
  const Extent* last_written = nullptr;
  for (const Extent& extent : extents) {
    const bool written = extent.role->written;
    const Extent* const other = written ? last : last_written;
    TORCH_CHECK_VALUE(other == nullptr || other->end <= extent.begin, "adamw_ema_: ",
                      other->role->name, "[", other->index, "] and ", extent.role->name, "[",
                      extent.index, "] share memory: every parameter, its gradient, moments, ",
                      "averages and copy must have memory of their own");
    if (last == nullptr || last->end < extent.end) last = &extent;
    if (!written) continue;
    if (last_written == nullptr || last_written->end < extent.end) last_written = &extent;
  }
}

mixflow::Constants checked_constants(int64_t step, double lr, double beta1, double beta2,
                                     double eps, double weight_decay,
                                     at::ArrayRef<double> ema_decays) {
  const double infinity = std::numeric_limits<double>::infinity();
  TORCH_CHECK_VALUE(ema_decays.size() <= mixflow::kMaxEmas,
                    "adamw_ema_: ema_decays must hold at most ", mixflow::kMaxEmas,
                    " decays, got ", ema_decays.size());
  TORCH_CHECK_VALUE(step >= 1, "adamw_ema_: step must be 1 or more, got ", step);
  check_number("lr", lr, 0.0, infinity);
  check_number("beta1", beta1, 0.0, 1.0);
  check_number("beta2", beta2, 0.0, 1.0);
  check_number("eps", eps, 0.0, infinity);
  check_number("weight_decay", weight_decay, 0.0, infinity);
  for (const double decay : ema_decays) check_number("each of ema_decays", decay, 0.0, 1.0);
  mixflow::Constants constants = {};
  constants.adamw = mixflow::make_adamw(lr, beta1, beta2, eps, weight_decay, step);
  for (const size_t k : c10::irange(ema_decays.size())) {
    constants.ema_weights[k] = static_cast<float>(1.0 - ema_decays[k]);
  }
  return constants;
}

void check_stored(const Tensor& stored) {
  TORCH_CHECK_VALUE(stored.scalar_type() == at::kFloat && stored.numel() == mixflow::kConstants &&
                        stored.is_contiguous(),
                    "adamw_ema_: constants must be ", mixflow::kConstants,
                    " contiguous Float, got ", stored.numel(), " of ", stored.scalar_type());
}

void check_tensors(TensorList params, TensorList grads, TensorList exp_avgs,
                   TensorList exp_avg_sqs, TensorList emas, TensorList copies, size_t each,
                   const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& grad_norm) {
  const size_t count = params.size();
  check_list("grads", grads, count, "one for each parameter");
  check_list("exp_avgs", exp_avgs, count, "one for each parameter");
  check_list("exp_avg_sqs", exp_avg_sqs, count, "one for each parameter");
  check_list("emas", emas, each * count,
             "for each of ema_decays one for each parameter, all of the first decay first");
  if (!copies.empty()) check_list("copies", copies, count, "none, or one for each parameter");
  for (size_t i = 0; i < count; ++i) {
    const Tensor& like = params[i];
    TORCH_CHECK_VALUE(like.device() == params[0].device(), "adamw_ema_: params[", i,
                      "] must be on ", params[0].device(), " like the first, got ", like.device(),
                      ": one call for each device");
    const at::ScalarType gradient = grads[0].scalar_type();
    TORCH_CHECK_VALUE(gradient == at::kFloat || gradient == at::kBFloat16,
                      "adamw_ema_: grads must be all Float or all BFloat16, got ", gradient);
    check_tensor("params", i, like, at::kFloat, like);
    check_tensor("grads", i, grads[i], gradient, like);
    check_tensor("exp_avgs", i, exp_avgs[i], at::kFloat, like);
    check_tensor("exp_avg_sqs", i, exp_avg_sqs[i], at::kFloat, like);
    for (size_t k = 0; k < each; ++k) {
      check_tensor("emas", k * count + i, emas[k * count + i], at::kFloat, like);
    }
    if (!copies.empty()) check_tensor("copies", i, copies[i], at::kBFloat16, like);
  }
  check_apart({{"params", params, true},
               {"grads", grads, false},
               {"exp_avgs", exp_avgs, true},
               {"exp_avg_sqs", exp_avg_sqs, true},
               {"emas", emas, true},
               {"copies", copies, true}});
  check_scalar("grad_scale", grad_scale, params);
  check_scalar("grad_norm", grad_norm, params);
}

// Autograd counts writes to find saved tensors that are no longer what they were.
void count_writes(const Arguments& all) {
  for (const TensorList list :
       {all.params, all.exp_avgs, all.exp_avg_sqs, all.emas, all.copies}) {
    for (const Tensor& tensor : list) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

// Null where it is not given.
const float* data_of(const std::optional<Tensor>& scalar) {
  return scalar.has_value() ? scalar->const_data_ptr<float>() : nullptr;
}

void run_cpu(const Arguments& all) {
  const float* const norm = data_of(all.grad_norm);
  if (norm != nullptr && !mixflow::is_finite(*norm)) return;
  const float factor = all.grad_scale.has_value() ? *data_of(all.grad_scale) : 1.0f;
  mixflow::Constants constants = all.constants;
  if (all.stored.has_value()) std::memcpy(&constants, data_of(all.stored), sizeof(constants));
  std::vector<float*> emas(all.emas_each());
  for (int64_t i = 0; i < all.count(); ++i) {
    for (int k = 0; k < all.emas_each(); ++k) {
      emas[k] = all.emas[k * all.count() + i].mutable_data_ptr<float>();
    }
    const mixflow::Run run{
        all.params[i].mutable_data_ptr<float>(),
        all.grads[i].const_data_ptr(),
        all.exp_avgs[i].mutable_data_ptr<float>(),
        all.exp_avg_sqs[i].mutable_data_ptr<float>(),
        all.copies.empty() ? nullptr : static_cast<uint16_t*>(all.copies[i].mutable_data_ptr()),
        emas.data(),
        constants.ema_weights,
        all.emas_each(),
        all.bfloat16_gradients()};
    at::parallel_for(0, all.params[i].numel(), kGrain, [&](int64_t begin, int64_t end) {
      mixflow::update_cpu(run, begin, end, constants.adamw, factor);
    });
  }
}

void store_cpu(const mixflow::Constants& constants, const Tensor& stored) {
  std::memcpy(stored.mutable_data_ptr<float>(), &constants, sizeof(constants));
}

#ifdef MIXFLOW_WITH_CUDA
void run_cuda(const Arguments& all) {
  const at::cuda::OptionalCUDAGuard guard(all.params[0].device());
  void* const stream = at::cuda::getCurrentCUDAStream().stream();
  std::vector<int64_t> sizes;
  std::vector<void*> pointers[6];
  const TensorList lists[] = {all.params, all.grads,  all.exp_avgs,
                              all.exp_avg_sqs, all.emas, all.copies};
  for (const Tensor& tensor : all.params) sizes.push_back(tensor.numel());
  for (int role = 0; role < 6; ++role) {
    for (const Tensor& tensor : lists[role]) {
      const bool reads = role == 1;
      pointers[role].push_back(reads ? const_cast<void*>(tensor.const_data_ptr())
                                     : tensor.mutable_data_ptr());
    }
  }
  const mixflow::Tensors tensors{all.count(),
                                 sizes.data(),
                                 pointers[0].data(),
                                 pointers[1].data(),
                                 pointers[2].data(),
                                 pointers[3].data(),
                                 pointers[4].data(),
                                 all.copies.empty() ? nullptr : pointers[5].data(),
                                 all.emas_each(),
                                 all.bfloat16_gradients()};
  const auto launch = [&](const mixflow::Table& table) {
    const char* const error =
        mixflow_adamw_ema_cuda(&table, all.bfloat16_gradients(), stream);
    TORCH_CHECK(error == nullptr, "adamw_ema_: the CUDA launch failed: ", error);
  };
  const auto* const stored = reinterpret_cast<const mixflow::Constants*>(data_of(all.stored));
  mixflow::for_each_table(tensors, all.constants, stored, data_of(all.grad_scale),
                          data_of(all.grad_norm), launch);
}

void store_cuda(const mixflow::Constants& constants, const Tensor& stored) {
  const at::cuda::OptionalCUDAGuard guard(stored.device());
  void* const stream = at::cuda::getCurrentCUDAStream().stream();
  const char* const error =
      mixflow_store_constants_cuda(&constants, stored.mutable_data_ptr<float>(), stream);
  TORCH_CHECK(error == nullptr, "adamw_ema_: the CUDA launch failed: ", error);
}
#endif

void run_meta(const Arguments&) {}

void store_meta(const mixflow::Constants&, const Tensor&) {}

template <void (*run)(const Arguments&)>
void run_counted(const Arguments& all) {
  if (all.count() == 0) return;
  count_writes(all);
  run(all);
}

template <void (*run)(const Arguments&)>
void adamw_ema_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                TensorList emas, TensorList copies, const std::optional<Tensor>& grad_scale,
                int64_t step, double lr, double beta1, double beta2, double eps,
                double weight_decay, at::ArrayRef<double> ema_decays,
                const std::optional<Tensor>& grad_norm) {
  const mixflow::Constants constants =
      checked_constants(step, lr, beta1, beta2, eps, weight_decay, ema_decays);
  check_tensors(params, grads, exp_avgs, exp_avg_sqs, emas, copies, ema_decays.size(), grad_scale,
                grad_norm);
  run_counted<run>({params, grads, exp_avgs, exp_avg_sqs, emas, copies, grad_scale, grad_norm,
                    constants, std::nullopt});
}

template <void (*run)(const Arguments&)>
void adamw_ema_from_constants_(TensorList params, TensorList grads, TensorList exp_avgs,
                               TensorList exp_avg_sqs, TensorList emas, TensorList copies,
                               const std::optional<Tensor>& grad_scale, const Tensor& constants,
                               const std::optional<Tensor>& grad_norm) {
  const size_t each = params.empty() ? 0 : emas.size() / params.size();
  TORCH_CHECK_VALUE(each <= mixflow::kMaxEmas, "adamw_ema_: emas must hold at most ",
                    mixflow::kMaxEmas, " averages of each parameter, got ", each);
  check_stored(constants);
  check_tensors(params, grads, exp_avgs, exp_avg_sqs, emas, copies, each, grad_scale, grad_norm);
  TORCH_CHECK_VALUE(params.empty() || constants.device() == params[0].device(),
                    "adamw_ema_: constants must be on ", params[0].device(), ", got ",
                    constants.device());
  run_counted<run>({params, grads, exp_avgs, exp_avg_sqs, emas, copies, grad_scale, grad_norm, {},
                    constants});
}

template <void (*store)(const mixflow::Constants&, const Tensor&)>
void adamw_constants_(const Tensor& constants, int64_t step, double lr, double beta1, double beta2,
                      double eps, double weight_decay, at::ArrayRef<double> ema_decays) {
  check_stored(constants);
  store(checked_constants(step, lr, beta1, beta2, eps, weight_decay, ema_decays), constants);
  constants.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

// Where `grad_norm`, one Float on the device, is given and infinite or NaN, nothing is written.
TORCH_LIBRARY_FRAGMENT(mixflow_fast, library) {
  library.def(
      "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor? grad_scale, *, "
      "int step, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "float[] ema_decays, Tensor? grad_norm=None) -> ()");
  // The same in two halves. The first writes the numbers of a step to where the parameters are; the
  // second reads them there, so that a CUDA graph with it makes a new step at every replay.
  library.def(
      "adamw_constants_(Tensor(a!) constants, *, int step, float lr, float beta1, float beta2, "
      "float eps, float weight_decay, float[] ema_decays) -> ()");
  library.def(
      "adamw_ema_from_constants_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor? grad_scale, *, "
      "Tensor constants, Tensor? grad_norm=None) -> ()");
}

TORCH_LIBRARY_IMPL(mixflow_fast, CPU, library) {
  library.impl("adamw_ema_", adamw_ema_<run_cpu>);
  library.impl("adamw_constants_", adamw_constants_<store_cpu>);
  library.impl("adamw_ema_from_constants_", adamw_ema_from_constants_<run_cpu>);
}

TORCH_LIBRARY_IMPL(mixflow_fast, Meta, library) {
  library.impl("adamw_ema_", adamw_ema_<run_meta>);
  library.impl("adamw_constants_", adamw_constants_<store_meta>);
  library.impl("adamw_ema_from_constants_", adamw_ema_from_constants_<run_meta>);
}

#ifdef MIXFLOW_WITH_CUDA
TORCH_LIBRARY_IMPL(mixflow_fast, CUDA, library) {
  library.impl("adamw_ema_", adamw_ema_<run_cuda>);
  library.impl("adamw_constants_", adamw_constants_<store_cuda>);
  library.impl("adamw_ema_from_constants_", adamw_ema_from_constants_<run_cuda>);
}
#endif
