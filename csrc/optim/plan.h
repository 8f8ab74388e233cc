// Plan keeps an optimizer's lists between steps, which spares Python all work per parameter in a step.
#pragma once

#include <Python.h>
#include <torch/custom_class.h>

#include <atomic>
#include <deque>
#include <unordered_map>
#include <unordered_set>

#include "arguments.h"

namespace dlkit::optim {
namespace {

// Defined in op.cpp: the kernels' op of a step, without and with the checks, and the checked norm.
void run_step(c10::string_view algorithm, const Lists& lists, const Settings& settings);
void check_and_step(c10::string_view algorithm, const Lists& lists, const Settings& settings);
Tensor grad_norm(TensorList grads);

// Tensors without counted references. Safe to use only while something else holds them.
class Unowned {
 public:
  Unowned() = default;
  explicit Unowned(const std::vector<Tensor>& tensors) {
    tensors_.reserve(tensors.size());
    for (const Tensor& tensor : tensors) add(tensor);
  }
  Unowned(Unowned&&) = default;
  Unowned& operator=(Unowned&& other) noexcept {
    std::swap(tensors_, other.tensors_);
    return *this;
  }
  ~Unowned() { clear(); }
  void clear() {
    for (Tensor& tensor : tensors_) c10::MaybeOwnedTraits<Tensor>::destroyBorrow(tensor);
    tensors_.clear();
  }
  void reserve(size_t count) { tensors_.reserve(count); }
  void add(const Tensor& tensor) { tensors_.push_back(c10::MaybeOwnedTraits<Tensor>::createBorrow(tensor)); }
  void replace(size_t i, const Tensor& tensor) {
    c10::MaybeOwnedTraits<Tensor>::destroyBorrow(tensors_[i]);
    tensors_[i] = c10::MaybeOwnedTraits<Tensor>::createBorrow(tensor);
  }
  bool empty() const { return tensors_.empty(); }
  size_t size() const { return tensors_.size(); }
  const Tensor& operator[](size_t i) const { return tensors_[i]; }
  auto begin() const { return tensors_.begin(); }
  auto end() const { return tensors_.end(); }
  operator TensorList() const { return tensors_; }

 private:
  std::vector<Tensor> tensors_;
};

// The version of each parameter with a remainder as the last step left it. Every in-place change that autograd sees
// raises a tensor's version. An optimizer has one Versions for all its plans.
class Versions : public torch::CustomClassHolder {
 public:
  static constexpr int64_t kUnknown = -1;
  static int64_t of(const Tensor& param) { return param.is_inference() ? kUnknown : int64_t(param._version()); }
  int64_t& at(const Tensor& param) {
    return versions_.emplace(param.unsafeGetTensorImpl(), kUnknown).first->second;  // a map's values stay in place
  }
  void trust(const std::vector<Tensor>& params) {
    for (const Tensor& param : params) at(param) = of(param);
  }
  std::vector<bool> changed(const std::vector<Tensor>& params) {
    std::vector<bool> result;
    for (const Tensor& param : params) result.push_back(is_changed(at(param), param));
    return result;
  }
  static bool is_changed(int64_t seen, const Tensor& param) { return seen != kUnknown && seen != of(param); }
  void clear() {
    for (auto& [param, version] : versions_) version = kUnknown;
  }

 private:
  std::unordered_map<const at::TensorImpl*, int64_t> versions_;
};

// An optimizer's tensors between steps. A run is a set of tensors that one op can serve: one device, the same arrays in
// every tensor, no two parameters that overlap. The optimizer's groups and state hold the tensors; before each step
// dlkit._C.holds() checks that they still do.
class Plan : public torch::CustomClassHolder {
 public:
  explicit Plan(c10::intrusive_ptr<Versions> versions) : versions_(std::move(versions)) {}

  void add(std::string algorithm, const std::vector<Tensor>& params, const std::vector<std::vector<Tensor>>& states,
           const std::vector<std::vector<Tensor>>& scales, const std::vector<Tensor>& remainders,
           const std::vector<Tensor>& ema, const std::vector<Tensor>& steps, std::vector<int64_t> groups,
           std::vector<std::string> labels) {
    Run run;
    run.algorithm = std::move(algorithm);
    run.params = Unowned(params);
    for (int s = 0; s < kStates; ++s) {
      run.states[s] = Unowned(states.at(s));
      run.scales[s] = Unowned(scales.at(s));
    }
    run.remainders = Unowned(remainders);
    run.ema = Unowned(ema);
    run.steps = Unowned(steps);
    run.groups = std::move(groups);
    run.labels = std::move(labels);
    if (!remainders.empty()) {
      for (const Tensor& param : params) run.versions.push_back(&versions_->at(param));
    }
    runs_.push_back(std::move(run));
  }

  // Takes the parameters that have no state yet, since they had no gradient.
  void watch(const std::vector<Tensor>& params) { stateless_ = Unowned(params); }

  // Collects the gradients, or the given ones, one for each parameter in the order of add(). Returns 0: ready; 1: a
  // parameter without state has a gradient; 2: a gradient is not dense.
  int64_t gather(const std::optional<std::vector<std::optional<Tensor>>>& given) {
    const Turn turn(busy_);
    return gather_all(given);
  }

  int64_t gather_all(const std::optional<std::vector<std::optional<Tensor>>>& given) {
    const Interpreter interpreter;
    for (const Tensor& param : stateless_) {
      if (param.grad().defined()) return 1;
    }
    size_t next = 0;
    idle_.clear();
    for (Run& run : runs_) {
      const int64_t first = int64_t(next);
      run.let_go();
      run.grads.reserve(run.params.size());
      run.all = true;
      for (size_t i = 0; i < run.params.size(); ++i, ++next) {
        const Tensor& param = run.params[i];
        // A counted reference, since other threads run during the step.
        const Tensor& held = run.keep(given ? or_undefined((*given)[next]) : param.grad());
        const bool lazy = held.defined() && (held.is_conj() || held.is_neg());
        if (lazy) run.resolved.emplace_back(held, held.resolve_conj().resolve_neg());
        const Tensor& grad = lazy ? run.resolved.back().second : held;
        run.grads.add(grad);
        if (!grad.defined()) {
          run.all = false;
          if (!run.ema.empty()) idle_.push_back(first + int64_t(i));
          continue;
        }
        if (grad.layout() != at::kStrided) return release(2);
        if (grad.scalar_type() == param.scalar_type() && grad.device() == param.device() &&
            grad.sizes() == param.sizes()) {
          continue;
        }
        if (!is_real_or_complex(grad.scalar_type()) || grad.is_complex() != param.is_complex() ||
            grad.device() != param.device() || grad.sizes() != param.sizes()) {
          const std::string found = c10::str(grad.scalar_type(), " ", grad.sizes(), " on ", grad.device());
          release(0);
          TORCH_CHECK(false, "step(): expected the gradient of ", run.labels.at(i), " to be ", param.scalar_type(), " ",
                      param.sizes(), " on ", param.device(), " as the parameter is, got ", found);
        }
      }
      if (!run.all) select(run);
    }
    return 0;
  }

  // The parameters that gather() found without a gradient and that have an average, by their place in the order of
  // add().
  std::vector<int64_t> idle() const { return idle_; }

  // Which parameters with a remainder were written since the last step, counted over those that have one.
  std::vector<int64_t> written() const {
    std::vector<int64_t> result;
    int64_t next = 0;
    for (const Run& run : runs_) {
      for (size_t i = 0; i < run.versions.size(); ++i, ++next) {
        if (Versions::is_changed(*run.versions[i], run.params[i])) result.push_back(next);
      }
    }
    return result;
  }

  // The norm of all gradients on each device.
  std::vector<Tensor> norms() {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::vector<std::vector<Tensor>> devices;
    for (const Run& run : runs_) {
      const auto& grads = run.active().grads;
      if (grads.empty()) continue;
      auto same = std::find_if(devices.begin(), devices.end(),
                               [&](const auto& list) { return list[0].device() == grads[0].device(); });
      if (same == devices.end()) same = devices.insert(devices.end(), std::vector<Tensor>());
      same->insert(same->end(), grads.begin(), grads.end());
    }
    std::vector<Tensor> result;
    for (const auto& grads : devices) result.push_back(grad_norm(grads));
    return result;
  }

  // Runs the ops, after gather() or, with `gather_first`, after gathering itself, since a call from Python takes 3 us.
  // If that gives another value than 0, step() returns it and does nothing.
  int64_t step(bool gather_first, const std::vector<double>& options, const std::vector<Tensor>& lr,
               const OptionalTensor& grad_norm, double max_norm, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf, bool write_grads, std::optional<int64_t> seed) {
    const Turn turn(busy_);
    if (gather_first) {
      const int64_t status = gather_all(std::nullopt);
      if (status != 0) return status;
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    try {
      if (write_grads) prepare_writing();
      const auto for_runs = [&](const auto& f) {
        for (const Run& whole : runs_) {
          const Run& run = whole.active();
          if (run.params.empty()) continue;
          const auto here = [&](const OptionalTensor& scalar) {
            return has(scalar) ? OptionalTensor(scalar->to(run.params[0].device(), true)) : std::nullopt;
          };
          std::vector<Tensor> rates;
          for (const Tensor& rate : lr) rates.push_back(*here(rate));
          f(run.algorithm, run.lists(),
            Settings{.groups = run.groups,
                     .options = options,
                     .lr = rates,
                     .grad_norm = here(grad_norm),
                     .max_norm = max_norm,
                     .grad_scale = here(grad_scale),
                     .found_inf = here(found_inf),
                     .write_grads = write_grads,
                     .seed = seed});
        }
      };
      if (runs_.size() > 1) {  // all are checked before the first writes
        for_runs(check);
        for_runs(run_step);
      } else {
        for_runs(check_and_step);
      }
    } catch (...) {
      release(0);
      throw;
    }
    if (write_grads) {
      for (const Run& run : runs_) {
        for (const auto& [held, resolved] : run.resolved) held.copy_(resolved);
      }
    }
    for (const Run& run : runs_) {
      for (size_t i = 0; i < run.versions.size(); ++i) *run.versions[i] = Versions::of(run.params[i]);
    }
    return release(0);
  }

  // step() with the most common arguments: converting an argument from Python takes 0.2 us each.
  int64_t step_default(const std::vector<double>& options) {
    return step(true, options, {}, std::nullopt, 0, std::nullopt, std::nullopt, false, std::nullopt);
  }

  // Lets go of the gradients.
  int64_t release(int64_t status) {
    const Interpreter interpreter;
    for (Run& run : runs_) {
      run.let_go();
    }
    return status;
  }

 private:
  struct Run {
    std::string algorithm;
    Unowned params, grads, states[kStates], scales[kStates], remainders, ema, steps;
    std::deque<Tensor> kept;                         // the gradients, during a step
    std::deque<std::pair<Tensor, Tensor>> resolved;  // conjugate or negated views, and their copies for the kernels
    std::vector<int64_t> groups;
    std::vector<std::string> labels;  // the parameters' names in error messages
    std::vector<int64_t*> versions;   // with remainders: the parameters' in Versions
    bool all = true;                  // every parameter has a gradient
    std::unique_ptr<Run> selected;    // the parameters with a gradient, where not all have one
    const Run& active() const { return selected ? *selected : *this; }
    Run& active() { return selected ? *selected : *this; }
    void let_go() {
      selected.reset();
      grads.clear();
      kept.clear();
      resolved.clear();
    }
    const Tensor& keep(Tensor tensor) { return kept.emplace_back(std::move(tensor)); }
    Lists lists() const {
      return {params, grads, {states[0], states[1], states[2]}, {scales[0], scales[1], scales[2]}, remainders,
              ema,    steps};
    }
  };

  // Called before gradients are written: raises for those that cannot be, and lets a gradient that two parameters share
  // be written only once.
  void prepare_writing() {
    std::unordered_set<const at::TensorImpl*> seen;
    for (Run& whole : runs_) {
      Run& run = whole.active();
      for (size_t i = 0; i < run.grads.size(); ++i) {
        const Tensor& grad = run.grads[i];
        TORCH_CHECK(
            at::has_internal_overlap(grad) != at::MemOverlap::Yes,
            "step(): expected gradients that can be written, with clip_gradients_in_place=True or a loss scale, "
            "got one whose elements share memory; use its contiguous() or clone()");
        if (!seen.insert(grad.unsafeGetTensorImpl()).second) run.grads.replace(i, run.keep(grad.clone()));
      }
    }
  }

  static void select(Run& run) {
    auto some = std::make_unique<Run>();
    some->algorithm = run.algorithm;
    for (size_t i = 0; i < run.params.size(); ++i) {
      if (!run.grads[i].defined()) continue;
      const auto pick = [i](Unowned& to, const Unowned& from) {
        if (!from.empty()) to.add(from[i]);
      };
      pick(some->params, run.params);
      some->grads.add(run.grads[i]);
      for (int s = 0; s < kStates; ++s) {
        pick(some->states[s], run.states[s]);
        pick(some->scales[s], run.scales[s]);
      }
      pick(some->remainders, run.remainders);
      pick(some->ema, run.ema);
      pick(some->steps, run.steps);
      some->groups.push_back(run.groups[i]);
    }
    run.selected = std::move(some);
  }

  // Methods of a custom class run without the GIL. While gradients are collected, no Python thread may remove one.
  class Interpreter {
   public:
    Interpreter() : state_(PyGILState_Ensure()) {}
    ~Interpreter() { PyGILState_Release(state_); }

   private:
    PyGILState_STATE state_;
  };

  // Admits one thread at a time: a second would change the data that the first reads.
  class Turn {
   public:
    explicit Turn(std::atomic_flag& busy) : busy_(busy) {
      TORCH_CHECK(!busy.test_and_set(), "step(): expected one thread at a time, and another one is in this optimizer");
    }
    ~Turn() { busy_.clear(); }

   private:
    std::atomic_flag& busy_;
  };

  std::atomic_flag busy_;
  c10::intrusive_ptr<Versions> versions_;
  std::vector<Run> runs_;
  Unowned stateless_;
  std::vector<int64_t> idle_;
};

}  // namespace
}  // namespace dlkit::optim
