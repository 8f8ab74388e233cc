// DropBlock as torch ops. The public two, dropblock2d and dropblock2d_, check their arguments and call the forward op,
// with an autograd node where a gradient is needed. Backward is dropblock2d_apply, the pure function of forward's state
// (seed, offset, number of dropped elements), which is also its own backward. Forward-mode derivatives, torch.func's
// transforms and devices without a kernel go through torch's own ops, with the same mask.
#include "../glue/op.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "../glue/autograd.h"
#include "../glue/checked.h"
#include "../glue/in_place.h"
#include "../glue/random.h"
#include "kernel.h"

namespace dlkit::dropblock2d {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

DLKIT_RUN(DropBlock2d, dropblock2d)

struct Corners {  // where a square has room
  int64_t size, rows, columns;
  Corners(int64_t height, int64_t width, int64_t block_size)
      : size(std::min({block_size, height, width})), rows(height - size + 1), columns(width - size + 1) {}
};

// With this probability a share p of all elements would be dropped if no squares overlapped.
double seed_probability(double p, int64_t height, int64_t width, const Corners& corners) {
  return p / double(corners.size * corners.size) * double(height * width) / double(corners.rows * corners.columns);
}

Tensor new_rng_state(const Tensor& input) { return at::zeros({3}, empty_rng_state(input).options()); }

// `drawn` has seed and offset if they are given; `rng_state` receives all three numbers or, where it is known, gives
// them. Layouts other than the two fast ones are made contiguous first.
template <class Device>
void run(const Device& device, const Tensor& input, Tensor& output, double p, int64_t block_size,
         const OptionalTensor& drawn, const Tensor& rng_state, bool known, const OptionalGenerator& generator) {
  if (input.numel() == 0) return;
  const bool by_channels = !input.is_contiguous() && input.is_contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor x = by_channels ? input : input.contiguous();
  Tensor y = output.strides() == x.strides() ? output : at::empty_like(x);
  DropBlock2d op{};
  op.x = x.const_data_ptr();
  op.y = y.mutable_data_ptr();
  op.planes = x.size(0) * x.size(1);
  op.height = x.size(2);
  op.width = x.size(3);
  op.channels = by_channels ? x.size(1) : 1;
  const Corners corners(op.height, op.width, block_size);
  op.size = corners.size;
  op.rows = corners.rows;
  op.columns = corners.columns;
  const double seeds = seed_probability(p, op.height, op.width, corners);
  op.threshold = drop_threshold(seeds);
  if (has(drawn)) {
    op.source = source_of(*drawn, input);
  } else if (seeds < 1) {
    op.source = draw(device, input, generator);
  }
  op.rng_state = rng_state.mutable_data_ptr<int64_t>();
  op.known = known;
  const Tensor bits = at::zeros({mask_words(op)}, input.options().dtype(at::kInt));
  op.dropped = reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>());
  op.dtype = dtype_of(x.scalar_type());
  run(device, op);
  if (!y.is_same(output)) output.copy_(y);
}

template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& drawn, double p, int64_t block_size,
                                   const OptionalGenerator& generator) {
  const Device device(input);
  Tensor y = at::empty_like(input), rng_state = new_rng_state(input);
  run(device, input, y, p, block_size, drawn, rng_state, false, generator);
  return {std::move(y), std::move(rng_state)};
}

template <class Device>
Tensor forward_(Tensor& input, const OptionalTensor& drawn, double p, int64_t block_size,
                const OptionalGenerator& generator) {
  at::assert_no_internal_overlap(input);
  const Device device(input);
  Tensor rng_state = new_rng_state(input);
  run(device, input, input, p, block_size, drawn, rng_state, false, generator);
  return rng_state;
}

template <class Device>
Tensor apply(const Tensor& input, const Tensor& rng_state, double p, int64_t block_size) {
  const Device device(input);
  Tensor y = at::empty_like(input);
  const Tensor here = rng_state.to(input.device());
  run(device, input, y, p, block_size, here, here, true, std::nullopt);
  return y;
}

// Shapes and dtypes of the above, for tracing.
Tensor rng_state_meta(const Tensor& input) { return at::empty({3}, empty_rng_state(input).options()); }

std::tuple<Tensor, Tensor> forward_meta(const Tensor& input, const OptionalTensor&, double, int64_t,
                                        const OptionalGenerator&) {
  return {at::empty_like(input), rng_state_meta(input)};
}

Tensor forward_meta_(Tensor& input, const OptionalTensor&, double, int64_t, const OptionalGenerator&) {
  return rng_state_meta(input);
}

Tensor apply_meta(const Tensor& input, const Tensor&, double, int64_t) { return at::empty_like(input); }

const auto& forward_op() {
  static const auto op = find_op<decltype(forward_meta)>("dropblock2d_forward");
  return op;
}

const auto& apply_op() {
  static const auto op = find_op<decltype(apply_meta)>("dropblock2d_apply");
  return op;
}

struct DropBlock2dBackward : SavingNode<DropBlock2dBackward, 1> {  // the state
  double p = 0;
  int64_t block_size = 1;

  std::string name() const override { return "DlkitDropBlock2dBackward"; }
  auto fields() const { return std::tie(p, block_size); }

  // dropblock2d_apply is its own backward, under autograd or not.
  variable_list backward(const variable_list& grads, const Saved& saved) override {
    if (!task_should_compute_output(0)) return variable_list(1);
    return {apply_op().call(grads[0], saved[0], p, block_size)};
  }
};

// The node of a call, or null where no gradient is needed.
auto node_of(const Tensor& input, double p, int64_t block_size) {
  const auto node = node_for<DropBlock2dBackward>(input);
  if (node) {
    node->p = p;
    node->block_size = block_size;
  }
  return node;
}

// input times dropblock2d(ones), its factors; 0 where an element is dropped, whatever its value.
Tensor scaled(const Tensor& input, const Tensor& factors) {
  return at::where(factors.ne(0), input * factors, 0).to(input.scalar_type());
}

Tensor apply_autograd(const Tensor& input, const Tensor& rng_state, double p, int64_t block_size) {
  const auto call = [&](const Tensor& x) {
    return below_autograd([&] { return apply_op().call(x, rng_state, p, block_size); });
  };
  if (has_tangent(input) || is_transformed()) {
    const auto type = accumulate_type(input.scalar_type());
    return scaled(input, call(at::ones_symint(input.sym_sizes(), input.options().dtype(type))));
  }
  const auto node = node_of(input, p, block_size);
  return with_history({call(input), rng_state}, node);
}

// Applies the kernel's mask and factor by torch's own ops.
Tensor formula(const Tensor& input, double p, int64_t block_size, const OptionalGenerator& generator,
               const OptionalTensor& stream) {
  const int64_t height = input.sym_size(2).guard_int(__FILE__, __LINE__);
  const int64_t width = input.sym_size(3).guard_int(__FILE__, __LINE__);
  if (height == 0 || width == 0) return input.clone();
  const Corners corners(height, width, block_size);
  const int64_t size = corners.size, margin = size - 1;
  const Tensor seeds = 1 - draw_mask({input.sym_size(0), input.sym_size(1), corners.rows, corners.columns}, input,
                                     std::min(seed_probability(p, height, width, corners), 1.0), generator, stream);
  const Tensor kept =
      1 - at::max_pool2d(at::constant_pad_nd(seeds, {margin, margin, margin, margin}), {size, size}, {1, 1});
  const Tensor factor = at::Scalar(input.sym_numel()) / kept.to(at::kDouble).sum().clamp_min(1);
  return scaled(input, kept.to(accumulate_type(input.scalar_type())) * factor);
}

void check(const char* name, const Tensor& input, double p, int64_t block_size, const OptionalGenerator& generator,
           const OptionalTensor& stream) {
  check_dropout(name, input, p, generator, stream);
  TORCH_CHECK_VALUE(input.dim() == 4, name, "(): expected input [N, C, H, W], got shape ", input.sym_sizes());
  TORCH_CHECK_VALUE(block_size >= 1, name, "(): expected block_size of at least 1, got ", block_size);
  TORCH_CHECK(at::isFloatingType(input.scalar_type()), name, "(): expected input of a floating type, got ",
              input.scalar_type());
}

Tensor dropblock2d(const Tensor& input, double p, int64_t block_size, const OptionalGenerator& generator,
                   const OptionalTensor& stream) {
  check("dropblock2d", input, p, block_size, generator, stream);
  if (needs_native(forward_op(), input)) return formula(input, p, block_size, generator, stream);
  const OptionalTensor drawn = draw_for(input, 0, stream);
  const auto node = node_of(input, p, block_size);
  return with_history(below_autograd([&] { return forward_op().call(input, drawn, p, block_size, generator); }), node);
}

void dropblock2d_(Tensor& input, double p, int64_t block_size, const OptionalGenerator& generator,
                  const OptionalTensor& stream) {
  check("dropblock2d_", input, p, block_size, generator, stream);
  check_written("dropblock2d_", input);
  if (needs_native(forward_op(), input)) {
    input.copy_(dropblock2d(input, p, block_size, generator, stream));
    return;
  }
  at::assert_no_internal_overlap(input);
  const OptionalTensor drawn = draw_for(input, 0, stream);
  const auto node = node_of(input, p, block_size);
  static const auto op = find_op<decltype(forward_meta_)>("dropblock2d_forward_");
  const Tensor rng_state = below_autograd([&] { return op.call(input, drawn, p, block_size, generator); });
  mark_written(input, node);
  if (node) node->save(0, rng_state);
}

template <class Device>
void implement_kernels(torch::Library& m) {
  implement_kernel<forward<Device>>(m, "dropblock2d_forward");
  implement_kernel<forward_<Device>>(m, "dropblock2d_forward_");
  implement_kernel<apply<Device>>(m, "dropblock2d_apply");
}

void implement_all(torch::Library& m) {
  implement_public<dropblock2d>(m, "dropblock2d");
  implement_public<dropblock2d_>(m, "dropblock2d_");
}

void implement_apply(torch::Library& m) { implement_kernel<apply_autograd>(m, "dropblock2d_apply"); }
void implement_meta(torch::Library& m) {
  implement_kernel<forward_meta>(m, "dropblock2d_forward");
  implement_kernel<forward_meta_>(m, "dropblock2d_forward_");
  implement_kernel<apply_meta>(m, "dropblock2d_apply");
}

}  // namespace
}  // namespace dlkit::dropblock2d

DLKIT_DEFINE_OPS(m) {
  m.def(
      "dropblock2d(Tensor input, float p, int block_size, *, Generator? generator=None, Tensor(a!)? stream=None)"
      " -> Tensor",
      DLKIT_RANDOM);
  m.def(
      "dropblock2d_(Tensor(a!) input, float p, int block_size, *, Generator? generator=None,"
      " Tensor(b!)? stream=None) -> ()",
      DLKIT_RANDOM);
  m.def(
      "dropblock2d_forward(Tensor input, Tensor? rng_state, float p, int block_size, Generator? generator=None)"
      " -> (Tensor y, Tensor rng_state)",
      DLKIT_RANDOM);
  m.def(
      "dropblock2d_forward_(Tensor(a!) input, Tensor? rng_state, float p, int block_size, Generator? generator=None)"
      " -> Tensor",
      DLKIT_RANDOM);
  m.def("dropblock2d_apply(Tensor input, Tensor rng_state, float p, int block_size) -> Tensor", DLKIT_PURE);
}

DLKIT_IMPLEMENT_KERNELS(dlkit::dropblock2d::implement_kernels)
DLKIT_IMPLEMENT_OPS(Meta, m) { dlkit::dropblock2d::implement_meta(m); }
DLKIT_IMPLEMENT_RANDOM_OPS(dlkit::dropblock2d::implement_all)
DLKIT_IMPLEMENT_OPS(Autograd, m) { dlkit::dropblock2d::implement_apply(m); }
DLKIT_IMPLEMENT_OPS(FuncTorchBatched, m) { dlkit::dropblock2d::implement_apply(m); }
