// Dropout and its variants as torch ops. The public three, dropout, dropout_ and dropout_add, check their arguments,
// choose the constants of kernel.h and call dropout_forward, with an autograd node where a gradient is needed. Backward
// is dropout_apply, the pure function of a state, which is also its own backward. philox_draw advances a
// dlkit.random.Philox. Forward-mode derivatives and torch.func's transforms go through a differentiable formula with
// the same mask, which dropout_mask draws.
#include "op.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/alpha_dropout.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/feature_alpha_dropout.h>
#include <ATen/ops/feature_dropout.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "../glue/autograd.h"
#include "../glue/checked.h"
#include "../glue/in_place.h"
#include "kernel.h"

namespace dlkit::dropout {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

DLKIT_RUN_WITH(KeptBits, Dropout, dropout)

// The function that an op computes: y = keep ? x * scale + shift : dropped, with a bit for every `inner` adjacent
// elements.
template <class Int>
struct Form {
  double p;
  Int inner;
  double scale, shift, dropped;
};

// Whether the kernels can take the tensor's memory as it is, and with which inner, period and spatial of kernel.h.
struct Layout {
  bool direct;
  int64_t inner, period, spatial;
};

// Whether dimensions [first, last) are in the order of a contiguous tensor, the last one with this stride.
bool in_order(const Tensor& x, int64_t first, int64_t last, int64_t stride) {
  for (int64_t d = last - 1; d >= first; stride *= x.size(d--)) {
    if (x.size(d) != 1 && x.stride(d) != stride) return false;
  }
  return true;
}

// Accepts one dimension innermost and the others in order, as in channels_last. With inner > 1 the elements of a
// channel or sample may be in any order.
Layout layout_of(const Tensor& x, int64_t inner) {
  const Layout other{false, inner, 1, 1};
  if (x.is_contiguous()) return {true, inner, 1, 1};
  int64_t dim = x.dim();
  if (inner == 1) {
    while (dim > 0 && (x.stride(dim - 1) != 1 || x.size(dim - 1) == 1)) --dim;
    if (dim == 0) return other;
    const int64_t period = x.size(dim - 1);
    int64_t spatial = 1;
    for (int64_t d = dim; d < x.dim(); ++d) spatial *= x.size(d);
    if (!in_order(x, dim, x.dim(), period) || !in_order(x, 0, dim - 1, period * spatial)) return other;
    return {true, period * spatial, period, spatial};
  }
  if (!x.is_non_overlapping_and_dense()) return other;
  int64_t elements = 1;
  while (dim > 0 && (elements < inner || x.size(dim - 1) == 1)) elements *= x.size(--dim);
  if (elements != inner || dim == 0) return other;
  if (in_order(x, 0, dim, inner)) return {true, inner, 1, 1};
  const int64_t period = x.size(dim - 1);
  if (x.stride(dim - 1) == 1 && in_order(x, 0, dim - 1, inner * period)) return {true, inner * period, period, 1};
  return other;
}

// Other layouts are made contiguous first.
template <class Device>
void run(const Device& device, const Tensor& input, const Tensor& residual, Tensor& output, const Form<int64_t>& form,
         const PhiloxSource& source, int64_t* rng_state, const KeptBits& bits) {
  const Layout layout = residual.defined() ? Layout{input.is_contiguous(), 1, 1, 1} : layout_of(input, form.inner);
  const bool fits = layout.direct && output.strides() == input.strides();
  const Tensor x = layout.direct ? input : input.contiguous();
  const Tensor added = residual.defined() ? residual.contiguous() : residual;
  const Tensor y = fits || (!layout.direct && output.is_contiguous()) ? output : at::empty_like(x);
  const Dropout op{.x = x.const_data_ptr(),
                   .residual = data_or_null(added),
                   .y = y.mutable_data_ptr(),
                   .numel = x.numel(),
                   .inner = layout.inner,
                   .source = source,
                   .rng_state = rng_state,
                   .threshold = drop_threshold(form.p),
                   .scale = form.scale,
                   .shift = form.shift,
                   .dropped = form.dropped,
                   .dtype = dtype_of(input.scalar_type()),
                   .apart = layout.spatial > 1,
                   .period = layout.period};
  run(device, op, bits);
  if (!y.is_same(output)) output.copy_(y);
}

// An empty input, or p = 1, needs no mask: nothing is drawn.
template <class Device>
Tensor forward_into(const Tensor& input, const Tensor& residual, Tensor& output, const Form<int64_t>& form,
                    const OptionalGenerator& generator, bool keep_bits) {
  const Device device(input);
  TORCH_CHECK(!keep_bits || (input.is_cpu() && form.inner == 1),
              "dropout: expected keep_bits on cpu, where each element has a bit of its own; got input on ",
              input.device(), ", one bit for ", form.inner, " elements");
  Tensor rng_state = empty_rng_state(input, keep_bits);
  const bool draws = form.p < 1 && input.numel() > 0;
  const PhiloxSource source = draws ? draw(device, input, generator) : PhiloxSource{};
  if (input.numel() > 0) {
    run(device, input, residual, output, form, source, rng_state.mutable_data_ptr<int64_t>(),
        bits_in(rng_state, input.numel(), false));
  } else {
    rng_state.zero_();
  }
  return rng_state;
}

// The same with the mask of a state.
template <class Device>
void apply_into(const Tensor& input, const Tensor& residual, Tensor& output, const Form<int64_t>& form,
                const Tensor& rng_state) {
  if (input.numel() == 0) return;
  run(Device(input), input, residual, output, form, source_of(rng_state, input), nullptr,
      bits_in(rng_state, input.numel(), true));
}

template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& input, double p, int64_t inner, double scale, double shift,
                                   double dropped, const OptionalGenerator& generator, bool keep_bits) {
  Tensor y = at::empty_like(input);
  Tensor rng_state = forward_into<Device>(input, Tensor(), y, {p, inner, scale, shift, dropped}, generator, keep_bits);
  return {std::move(y), std::move(rng_state)};
}

template <class Device>
Tensor apply(const Tensor& input, const Tensor& rng_state, double p, int64_t inner, double scale, double shift,
             double dropped) {
  Tensor y = at::empty_like(input);
  apply_into<Device>(input, Tensor(), y, {p, inner, scale, shift, dropped}, rng_state);
  return y;
}

template <class Device>
Tensor forward_(Tensor& input, const OptionalTensor& rng_state, double p, int64_t inner, double scale, double shift,
                double dropped, const OptionalGenerator& generator, bool keep_bits) {
  at::assert_no_internal_overlap(input);
  const Form<int64_t> form{p, inner, scale, shift, dropped};
  if (!has(rng_state)) return forward_into<Device>(input, Tensor(), input, form, generator, keep_bits);
  apply_into<Device>(input, Tensor(), input, form, *rng_state);
  return rng_state->clone();
}

template <class Device>
std::tuple<Tensor, Tensor> add_forward(const Tensor& input, const Tensor& residual, const OptionalTensor& rng_state,
                                       double p, const OptionalGenerator& generator, bool keep_bits) {
  Tensor y = at::empty(input.sizes(), input.options());
  const Form<int64_t> form{p, 1, dropout_scale(p), 0, 0};
  if (!has(rng_state)) {
    Tensor drawn = forward_into<Device>(input, residual, y, form, generator, keep_bits);
    return {std::move(y), std::move(drawn)};
  }
  apply_into<Device>(input, residual, y, form, *rng_state);
  return {std::move(y), rng_state->clone()};
}

// Shapes and dtypes of the above, for tracing. A given state is returned unchanged.
std::tuple<Tensor, Tensor> add_forward_meta(const Tensor& input, const Tensor&, const OptionalTensor& rng_state, double,
                                            const OptionalGenerator&, bool keep_bits) {
  return {at::empty_symint(input.sym_sizes(), input.options()),
          has(rng_state) ? at::empty_like(*rng_state) : empty_rng_state(input, keep_bits)};
}

std::tuple<Tensor, Tensor> forward_meta(const Tensor& input, double, c10::SymInt, double, double, double,
                                        const OptionalGenerator&, bool keep_bits) {
  return {at::empty_like(input), empty_rng_state(input, keep_bits)};
}

Tensor apply_meta(const Tensor& input, const Tensor&, double, c10::SymInt, double, double, double) {
  return at::empty_like(input);
}

Tensor forward_meta_(Tensor& input, const OptionalTensor& rng_state, double, c10::SymInt, double, double, double,
                     const OptionalGenerator&, bool keep_bits) {
  return has(rng_state) ? at::empty_like(*rng_state) : empty_rng_state(input, keep_bits);
}

// Draws (seed, offset) of this call from a dlkit.random.Philox, which advances.
Tensor philox_draw(Tensor& stream) {
  static std::mutex mutex;
  TORCH_CHECK(stream.is_cpu() && stream.scalar_type() == at::kLong && stream.numel() == 2 && stream.is_contiguous(),
              "philox_draw(): expected stream to be int64 [2] on cpu, got ", stream.scalar_type(), " ", stream.sizes(),
              " on ", stream.device());
  const PhiloxSource source = drawn_once(From::Stream, [&]() -> PhiloxSource {
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t* const data = stream.mutable_data_ptr<int64_t>();
    const uint64_t offset = uint64_t(data[1]);
    data[1] = int64_t(offset + kDrawn);
    return {nullptr, nullptr, uint64_t(data[0]), offset};
  });
  Tensor rng_state = at::empty({2}, stream.options());
  int64_t* const data = rng_state.mutable_data_ptr<int64_t>();
  data[0] = int64_t(source.seed);
  data[1] = int64_t(source.offset);
  return rng_state;
}

Tensor philox_draw_meta(Tensor& stream) { return at::empty_like(stream); }

const auto& forward_op() {
  static const auto op = find_op<decltype(forward_meta)>("dropout_forward");
  return op;
}

Tensor call_apply(const Tensor& input, const Tensor& rng_state, const Form<c10::SymInt>& form) {
  static const auto op = find_op<ApplyOp>("dropout_apply");
  return op.call(input, rng_state, form.p, form.inner, form.scale, form.shift, form.dropped);
}

Tensor call_forward_(Tensor& input, const OptionalTensor& rng_state, const Form<c10::SymInt>& form,
                     const OptionalGenerator& generator, bool keep_bits) {
  static const auto op = find_op<decltype(forward_meta_)>("dropout_forward_");
  return op.call(input, rng_state, form.p, form.inner, form.scale, form.shift, form.dropped, generator, keep_bits);
}

std::tuple<Tensor, Tensor> call_forward(const Tensor& input, const OptionalTensor& rng_state,
                                        const Form<c10::SymInt>& form, const OptionalGenerator& generator,
                                        bool keep_bits = false) {
  if (has(rng_state)) return {call_apply(input, *rng_state, form), *rng_state};
  return forward_op().call(input, form.p, form.inner, form.scale, form.shift, form.dropped, generator, keep_bits);
}

Form<c10::SymInt> linear_part(Form<c10::SymInt> form) {
  form.shift = form.dropped = 0;
  return form;
}

// Whether each element has its own bit and backward should read it rather than draw again.
bool keeps_bits(const Tensor& input, const Form<c10::SymInt>& form) {
  const auto inner = form.inner.maybe_as_int();
  return inner.has_value() && *inner == 1 && should_keep_bits(input, form.p);
}

struct DropoutBackward : SavingNode<DropoutBackward, 1> {  // the state
  Form<c10::SymInt> form{};
  bool residual = false;  // there is a second input, whose gradient is the output's

  std::string name() const override { return "DlkitDropoutBackward"; }
  auto fields() const { return std::tie(form.p, form.inner, form.scale, residual); }

  // dropout_apply is its own backward, under autograd or not.
  variable_list backward(const variable_list& grads, const Saved& saved) override {
    variable_list result(residual ? 2 : 1);
    if (residual && task_should_compute_output(1)) result[1] = grads[0];
    if (task_should_compute_output(0)) result[0] = call_apply(grads[0], saved[0], form);
    return result;
  }
};

// The node of a call, or null where no gradient is needed.
auto node_of(const Form<c10::SymInt>& form, const auto&... inputs) {
  const auto node = node_for<DropoutBackward>(inputs...);
  if (node) {
    node->form = linear_part(form);
    node->residual = sizeof...(inputs) > 1;
  }
  return node;
}

// `keep` is not zero where an element stays.
Tensor select(const Tensor& input, const Tensor& keep, const Form<c10::SymInt>& form) {
  const auto constant = [&](double value) { return at::scalar_tensor(value, input.options()); };
  const Tensor kept = form.shift == 0 ? input * form.scale : input * form.scale + form.shift;
  return at::where(keep.ne(0), kept, constant(form.dropped));
}

// dropout_apply for gradients, forward-mode derivatives and transforms.
Tensor apply_autograd(const Tensor& input, const Tensor& rng_state, double p, c10::SymInt inner, double scale,
                      double shift, double dropped) {
  const Form<c10::SymInt> form{p, inner, scale, shift, dropped};
  if (has_tangent(input) || is_transformed()) {
    const Tensor ones = at::ones_symint(input.sym_sizes(), input.options().dtype(at::kFloat));
    return select(input, below_autograd([&] { return call_apply(ones, rng_state, {p, inner, 1, 0, 0}); }), form);
  }
  const auto node = node_of(form, input);
  return with_history({below_autograd([&] { return call_apply(input, rng_state, form); }), rng_state}, node);
}

// The constants of a call, and torch's checks. mask_ndim: how many leading dimensions the mask has, -1 for all.
Form<c10::SymInt> form_of(const char* name, const Tensor& input, double p, int64_t mask_ndim, bool alpha,
                          const OptionalGenerator& generator, const OptionalTensor& stream) {
  TORCH_CHECK_NOT_IMPLEMENTED(!input.is_nested() || (mask_ndim < 0 && !alpha), name,
                              "(): expected input that is not a nested tensor for alpha_dropout and for dropout of "
                              "channels or samples: call it on each tensor of unbind()");
  check_dropout(name, input, p, generator, stream);
  TORCH_CHECK(mask_ndim >= -1 && mask_ndim <= input.dim(), name, "(): expected input of at least ", mask_ndim,
              " dimensions, got shape ", input.sym_sizes());
  c10::SymInt inner = 1;
  if (mask_ndim >= 0) {
    for (const auto& size : input.sym_sizes().slice(mask_ndim)) inner = inner * size;
    inner = inner.max(1);
  }
  if (!alpha) return {p, inner, dropout_scale(p), 0, 0};
  // Klambauer et al., "Self-normalizing neural networks", 2017: dropped elements become SELU's lower bound, then the
  // mean and the variance of normal input are restored. p = 1 gives zeros, as in torch.
  constexpr double saturated = 1.7580993408473766;
  const double scale = p < 1 ? 1 / std::sqrt((saturated * saturated * p + 1) * (1 - p)) : 0;
  return {p, inner, scale, saturated * scale * p, saturated * scale * (p - 1)};
}

// dropout_mask without vmap. `input`: ones.
Tensor mask(const Tensor& input, double p, const OptionalGenerator& generator, const OptionalTensor& stream) {
  if (is_transformed()) {  // for the transforms outside of this one
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<decltype(mask)>("dropout_mask");
    return op.call(input, p, generator, stream);
  }
  if (!has_kernel(forward_op(), input)) {
    TORCH_CHECK_NOT_IMPLEMENTED(!has(stream), "dropout: no kernel for a dlkit.random.Philox on ", input.device());
    return at::bernoulli(input, 1 - p, generator);
  }
  return std::get<0>(call_forward(input, draw_for(input, p, stream), {p, 1, 1, 0, 0}, generator));
}

int64_t vmap_level(const Tensor& tensor) {
  const auto* const batch = at::functorch::maybeGetBatchedImpl(tensor);
  return batch == nullptr ? -1 : batch->level();
}

// One mask for all samples of a vmap, or one for each, which is the mask a call without vmap draws for the whole batch.
Tensor mask_vmap(const Tensor& input, double p, const OptionalGenerator& generator, const OptionalTensor& stream) {
  // torch's own random op, which draws nothing for an empty tensor, raises or returns a batched tensor as `randomness`
  // asks.
  const Tensor probe = at::rand({0});
  const c10::impl::ExcludeDispatchKeyGuard no_vmap(c10::DispatchKey::FuncTorchVmapMode);
  const Tensor outside = at::rand({0});
  if (vmap_level(probe) == vmap_level(outside)) return draw_mask(input.sym_sizes(), input, p, generator, stream);
  const auto* const batch = at::functorch::maybeGetBatchedImpl(probe);
  std::vector<c10::SymInt> sizes = input.sym_sizes().vec();
  sizes.insert(sizes.begin(), batch->value().sym_size(batch->bdim()));
  return at::functorch::makeBatched(draw_mask(sizes, input, p, generator, stream), 0, batch->level());
}

Tensor by_mask(const Tensor& input, const Form<c10::SymInt>& form, int64_t mask_ndim,
               const OptionalGenerator& generator, const OptionalTensor& stream) {
  std::vector<c10::SymInt> sizes = input.sym_sizes().vec();
  if (mask_ndim >= 0) std::fill(sizes.begin() + mask_ndim, sizes.end(), 1);
  if (form.p == 1) return select(input, at::zeros_symint(sizes, input.options()), form);
  return select(input, draw_mask(sizes, input, form.p, generator, stream), form);
}

// torch's own op, for dtypes, layouts and devices without a kernel.
Tensor native(const char* name, const Tensor& input, double p, int64_t mask_ndim, bool alpha,
              const OptionalGenerator& generator, const OptionalTensor& stream) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(generator.has_value() && generator->defined()) && !has(stream), name,
                              "(): expected no generator for ", input.scalar_type(), " input on ", input.device(),
                              " in layout ", input.layout(), ", where torch's own dropout serves; got one");
  if (mask_ndim < 0) return alpha ? at::alpha_dropout(input, p, true) : at::dropout(input, p, true);
  TORCH_CHECK_NOT_IMPLEMENTED(mask_ndim == 2, name, "(): expected fp64, fp32, bf16 or fp16 input, got ",
                              input.scalar_type());
  return alpha ? at::feature_alpha_dropout(input, p, true) : at::feature_dropout(input, p, true);
}

Tensor dropout(const Tensor& input, double p, int64_t mask_ndim, bool alpha, const OptionalGenerator& generator,
               const OptionalTensor& stream) {
  const auto form = form_of("dropout", input, p, mask_ndim, alpha, generator, stream);
  if (!has_kernel(forward_op(), input)) return native("dropout", input, p, mask_ndim, alpha, generator, stream);
  if (has_tangent(input) || is_transformed()) return by_mask(input, form, mask_ndim, generator, stream);
  const OptionalTensor drawn = draw_for(input, p, stream);
  const auto node = node_of(form, input);
  return with_history(
      below_autograd([&] { return call_forward(input, drawn, form, generator, node && keeps_bits(input, form)); }),
      node);
}

const auto& add_op() {
  static const auto op = find_op<AddForwardOp>("dropout_add_forward");
  return op;
}

// dropout(input) + residual, which broadcasts and promotes as the addition does. One pass where neither is needed.
Tensor dropout_add(const Tensor& input, const Tensor& residual, double p, const OptionalGenerator& generator,
                   const OptionalTensor& stream) {
  const auto form = form_of("dropout_add", input, p, -1, false, generator, stream);
  TORCH_CHECK(residual.defined(), "dropout_add(): expected residual to be a Tensor, got None");
  if (!has_form_of(input, residual) || needs_native(add_op(), input, residual)) {
    return drop(input, p, generator, stream) + residual;
  }
  const OptionalTensor drawn = draw_for(input, p, stream);
  const auto node = node_of(form, input, residual);
  return with_history(below_autograd([&] {
                        return add_op().call(input, residual, drawn, p, generator, node && should_keep_bits(input, p));
                      }),
                      node);
}

void dropout_(Tensor& input, double p, int64_t mask_ndim, bool alpha, const OptionalGenerator& generator,
              const OptionalTensor& stream) {
  const auto form = form_of("dropout_", input, p, mask_ndim, alpha, generator, stream);
  check_written("dropout_", input);
  if (needs_native(forward_op(), input)) {
    input.copy_(dropout(input, p, mask_ndim, alpha, generator, stream));
    return;
  }
  at::assert_no_internal_overlap(input);
  const OptionalTensor drawn = draw_for(input, p, stream);
  const auto node = node_of(form, input);
  const Tensor rng_state =
      below_autograd([&] { return call_forward_(input, drawn, form, generator, node && keeps_bits(input, form)); });
  mark_written(input, node);
  if (node) node->save(0, rng_state);
}

template <class Device>
void implement_kernels(torch::Library& m) {
  implement_kernel<forward<Device>>(m, "dropout_forward");
  implement_kernel<forward_<Device>>(m, "dropout_forward_");
  implement_kernel<apply<Device>>(m, "dropout_apply");
  implement_kernel<add_forward<Device>>(m, "dropout_add_forward");
}

void implement_all(torch::Library& m) {
  implement_public<dropout>(m, "dropout");
  implement_public<dropout_>(m, "dropout_");
  implement_public<dropout_add>(m, "dropout_add");
}

void implement_mask(torch::Library& m) { implement_kernel<mask>(m, "dropout_mask"); }
void implement_apply(torch::Library& m) { implement_kernel<apply_autograd>(m, "dropout_apply"); }
void implement_meta(torch::Library& m) {
  implement_kernel<forward_meta>(m, "dropout_forward");
  implement_kernel<forward_meta_>(m, "dropout_forward_");
  implement_kernel<apply_meta>(m, "dropout_apply");
  implement_kernel<add_forward_meta>(m, "dropout_add_forward");
  m.impl("philox_draw", philox_draw_meta);
}

}  // namespace
}  // namespace dlkit::dropout

DLKIT_DEFINE_OPS(m) {
  m.def(
      "dropout(Tensor input, float p, int mask_ndim=-1, bool alpha=False, *, Generator? generator=None,"
      " Tensor(a!)? stream=None) -> Tensor",
      DLKIT_RANDOM);
  m.def(
      "dropout_(Tensor(a!) input, float p, int mask_ndim=-1, bool alpha=False, *, Generator? generator=None,"
      " Tensor(b!)? stream=None) -> ()",
      DLKIT_RANDOM);
  m.def(
      "dropout_forward(Tensor input, float p, SymInt inner, float scale, float shift, float dropped,"
      " Generator? generator=None, bool keep_bits=False) -> (Tensor y, Tensor rng_state)",
      DLKIT_RANDOM);
  m.def(
      "dropout_forward_(Tensor(a!) input, Tensor? rng_state, float p, SymInt inner, float scale, float shift,"
      " float dropped, Generator? generator=None, bool keep_bits=False) -> Tensor",
      DLKIT_RANDOM);
  m.def(
      "dropout_apply(Tensor input, Tensor rng_state, float p, SymInt inner, float scale, float shift, float dropped)"
      " -> Tensor",
      DLKIT_PURE);
  m.def(
      "dropout_add(Tensor input, Tensor residual, float p, *, Generator? generator=None, Tensor(a!)? stream=None)"
      " -> Tensor",
      DLKIT_RANDOM);
  m.def(
      "dropout_add_forward(Tensor input, Tensor residual, Tensor? rng_state, float p, Generator? generator=None,"
      " bool keep_bits=False) -> (Tensor y, Tensor rng_state)",
      DLKIT_RANDOM);
  m.def("dropout_mask(Tensor input, float p, *, Generator? generator=None, Tensor(a!)? stream=None) -> Tensor",
        DLKIT_RANDOM);
  m.def("philox_draw(Tensor(a!) stream) -> Tensor", DLKIT_PURE);
}

DLKIT_IMPLEMENT_OPS(CPU, m) { m.impl("philox_draw", dlkit::dropout::philox_draw); }
DLKIT_IMPLEMENT_KERNELS(dlkit::dropout::implement_kernels)
DLKIT_IMPLEMENT_OPS(Meta, m) { dlkit::dropout::implement_meta(m); }
DLKIT_IMPLEMENT_RANDOM_OPS(dlkit::dropout::implement_all)
DLKIT_IMPLEMENT_OPS(Autograd, m) {
  dlkit::dropout::implement_mask(m);
  dlkit::dropout::implement_apply(m);
}
DLKIT_IMPLEMENT_OPS(CompositeExplicitAutograd, m) { dlkit::dropout::implement_mask(m); }
DLKIT_IMPLEMENT_OPS(FuncTorchVmapMode, m) { dlkit::implement_kernel<dlkit::dropout::mask_vmap>(m, "dropout_mask"); }
DLKIT_IMPLEMENT_OPS(FuncTorchBatched, m) { dlkit::dropout::implement_apply(m); }
