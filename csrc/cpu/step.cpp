// The CPU walker: one parallel region for the whole step, whatever the number of tensors, groups and dtypes.
// setup.py compiles this file once per instruction set, with FUSED_ISA naming the namespace; simd.cpp chooses at run
// time.
#include "step.h"

#include <algorithm>

#include "../convert.h"
#include "../dispatch.h"
#include "../prep.h"

#ifndef FUSED_ISA
#define FUSED_ISA baseline
#endif

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int kBlock = 256;          // elements between two prefetches; a block of every stream, widened, stays in L1
constexpr int kPrefetchBytes = 512;  // how far ahead of the block

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FUSED_HD float widen(float x) { return x; }
FUSED_HD double widen(double x) { return x; }
FUSED_HD float widen(BFloat16 x) { return bf16_to_float(x.bits); }
FUSED_HD float widen(Float16 x) { return f16_to_float(x.bits); }

FUSED_HD void narrow(float x, float& out) { out = x; }
FUSED_HD void narrow(double x, double& out) { out = x; }
FUSED_HD void narrow(float x, BFloat16& out) { out.bits = float_to_bf16(x); }
FUSED_HD void narrow(float x, Float16& out) { out.bits = float_to_f16(x); }

// Calls f with a value of the type that `dtype` stands for.
template <class F>
void visit_dtype(Dtype dtype, F&& f) {
  if (dtype == kFloat32) f(float{});
  else if (dtype == kBFloat16) f(BFloat16{});
  else f(Float16{});
}

// One tensor of a row: where it lies and what it holds.
struct Stream {
  char* data;
  Dtype dtype;
  int itemsize;

  Stream(int64_t address, int64_t signature, int position)
      : data(reinterpret_cast<char*>(address)), dtype(dtype_of(signature, position)) {
    itemsize = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  }

  char* at(int64_t element) const { return data + element * itemsize; }

  void prefetch(int64_t element, int count) const {
    for (int byte = 0; byte < count * itemsize; byte += 64) __builtin_prefetch(at(element) + kPrefetchBytes + byte);
  }

  // `count` elements as float32, in `scratch`; and back again.
  void load(int64_t element, int count, float* scratch) const {
    visit_dtype(dtype, [&](auto type) {
      const auto* in = reinterpret_cast<const decltype(type)*>(at(element));
      for (int i = 0; i < count; ++i) scratch[i] = widen(in[i]);
    });
  }
  void store(int64_t element, int count, const float* scratch) const {
    visit_dtype(dtype, [&](auto type) {
      auto* out = reinterpret_cast<decltype(type)*>(at(element));
      for (int i = 0; i < count; ++i) narrow(scratch[i], out[i]);
    });
  }
};

// The streams of one row: param, grad, states.
template <int S>
struct Row {
  Stream param, grad;

  Row(const int64_t* row, int64_t grad_address)
      : param(row[kParam], row[kSignature], 0), grad(grad_address, row[kSignature], 1), row_(row) {}

  Stream state(int s) const { return Stream(row_[kFirstState + s], row_[kSignature], 2 + s); }

  void prefetch(int64_t element, int count) const {
    param.prefetch(element, count);
    grad.prefetch(element, count);
    for (int s = 0; s < S; ++s) state(s).prefetch(element, count);
  }

 private:
  const int64_t* row_;
};

// The loop over elements that the compiler vectorises. P, G and A are what param, grad and states are stored as.
template <class Rule, class T, int S, class P, class G, class A>
void update_block(const Hyper<T>& hyper, P* param, const G* grad, A* const* states, int count) {
  const Hyper<T> h = hyper;
  A* state[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) state[s] = states[s];
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    T value[S > 0 ? S : 1];
    for (int s = 0; s < S; ++s) value[s] = widen(state[s][i]);
    narrow(apply<Rule, T, S>(h, widen(param[i]), widen(grad[i]), value), param[i]);
    for (int s = 0; s < S; ++s) narrow(value[s], state[s][i]);
  }
}

// Two neighbouring bfloat16 values in one word, at any even address: the odd one is a float32 with a lower half to be
// masked away, the even one has to be shifted. So nothing moves between lanes, which two-byte loads and stores cost.
using Pair = uint32_t __attribute__((may_alias, aligned(2)));

FUSED_HD float even(uint32_t pair) { return bits_float(pair << 16); }
FUSED_HD float odd(uint32_t pair) { return bits_float(pair & 0xffff0000u); }
FUSED_HD uint32_t join(float even, float odd) {
  // Where nothing but bfloat16 comes in, no NaN has a lower half that rounding could carry out of it.
  return (round_to_upper_half(even) >> 16) | (round_to_upper_half(odd) & 0xffff0000u);
}

template <class Rule, int S>
void update_pairs(const Hyper<float>& hyper, Pair* param, const Pair* grad, BFloat16* const* states, int count) {
  const Hyper<float> h = hyper;
  Pair* state[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) state[s] = reinterpret_cast<Pair*>(states[s]);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    float evens[S > 0 ? S : 1], odds[S > 0 ? S : 1];
    for (int s = 0; s < S; ++s) {
      evens[s] = even(state[s][i]);
      odds[s] = odd(state[s][i]);
    }
    const float first = apply<Rule, float, S>(h, even(param[i]), even(grad[i]), evens);
    param[i] = join(first, apply<Rule, float, S>(h, odd(param[i]), odd(grad[i]), odds));
    for (int s = 0; s < S; ++s) state[s][i] = join(evens[s], odds[s]);
  }
}

// All in bfloat16: in pairs, and the last element alone where it has no neighbour.
template <class Rule, class T, int S>
void update_block(const Hyper<T>& h, BFloat16* param, const BFloat16* grad, BFloat16* const* states, int count) {
  update_pairs<Rule, S>(h, reinterpret_cast<Pair*>(param), reinterpret_cast<const Pair*>(grad), states, count / 2);
  if (count % 2 == 0) return;
  BFloat16* last[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) last[s] = states[s] + count - 1;
  update_block<Rule, T, S, BFloat16, BFloat16, BFloat16>(h, param + count - 1, grad + count - 1, last, 1);
}

// The dtypes in which models are trained, straight from memory to memory.
template <class Rule, class T, int S, class P, class G, class A>
void update_direct(const Hyper<T>& h, const Row<S>& row, int64_t begin, int64_t end) {
  for (int64_t element = begin; element < end; element += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - element));
    row.prefetch(element, count);
    A* states[S > 0 ? S : 1];
    for (int s = 0; s < S; ++s) states[s] = reinterpret_cast<A*>(row.state(s).at(element));
    update_block<Rule, T, S>(h, reinterpret_cast<P*>(row.param.at(element)),
                             reinterpret_cast<const G*>(row.grad.at(element)), states, count);
  }
}

// Any other combination, by way of float32 copies of each block.
template <class Rule, int S>
void update_copied(const Hyper<float>& h, const Row<S>& row, int64_t begin, int64_t end) {
  alignas(64) float param[kBlock], grad[kBlock], state[S > 0 ? S : 1][kBlock];
  float* states[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) states[s] = state[s];
  for (int64_t element = begin; element < end; element += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - element));
    row.prefetch(element, count);
    row.param.load(element, count, param);
    row.grad.load(element, count, grad);
    for (int s = 0; s < S; ++s) row.state(s).load(element, count, state[s]);
    update_block<Rule, float, S>(h, param, grad, states, count);
    row.param.store(element, count, param);
    for (int s = 0; s < S; ++s) row.state(s).store(element, count, state[s]);
  }
}

template <class Rule, int S>
void update_chunk(const Tables& t, int64_t row_number, int64_t chunk) {
  const int64_t* columns = t.rows + row_number * kRowWidth;
  const double* hyper = t.hyper + row_number * kHyperWidth;
  const int64_t begin = chunk * kChunk, end = std::min(columns[kNumel], begin + kChunk);
  const Row<S> row(columns, t.grads[row_number]);
  const Dtype param = row.param.dtype, grad = row.grad.dtype, states = S > 0 ? row.state(0).dtype : param;
  bool alike = true;
  for (int s = 1; s < S; ++s) alike &= row.state(s).dtype == states;

  if (param == kFloat64) {
    update_direct<Rule, double, S, double, double, double>(read_hyper<double>(hyper), row, begin, end);
    return;
  }
  const Hyper<float> h = read_hyper<float>(hyper);
  if (!alike || param != grad) update_copied<Rule, S>(h, row, begin, end);
  else if (param == kFloat32 && states == kFloat32)
    update_direct<Rule, float, S, float, float, float>(h, row, begin, end);
  else if (param == kBFloat16 && states == kBFloat16)
    update_direct<Rule, float, S, BFloat16, BFloat16, BFloat16>(h, row, begin, end);
  else if (param == kBFloat16 && states == kFloat32)
    update_direct<Rule, float, S, BFloat16, BFloat16, float>(h, row, begin, end);
  else update_copied<Rule, S>(h, row, begin, end);
}

template <class Rule>
void update(const Tables& t, int64_t desc) {
  const int64_t row = (desc >> 8) & 0xffffff, chunk = desc >> 32;
  if (t.hyper[row * kHyperWidth + kSkip] != 0.0) return;
  const int64_t signature = t.rows[row * kRowWidth + kSignature];
  visit_states<Rule>(signature, [&](auto states) {
    constexpr int S = decltype(states)::value;
    update_chunk<Rule, S>(t, row, chunk);
  });
}

}  // namespace

bool step(const char* rule, const Tables& t, int threads) {
  return visit_rule(rule, [&](auto tag) {
    using Rule = typename decltype(tag)::type;
    // Small pieces taken as they come: a static split waits for the slower core as soon as one is shared.
    const int grain = static_cast<int>(std::clamp<int64_t>(t.chunks / (int64_t{threads} * 64), 1, 4));
#pragma omp parallel num_threads(threads)
    {
      BiasCorrections memo{};
#pragma omp for schedule(static)
      for (int64_t row = 0; row < t.tensors; ++row) prepare(t, row, memo);
#pragma omp for schedule(dynamic, grain)
      for (int64_t i = 0; i < t.chunks; ++i) update<Rule>(t, t.desc[i]);
    }
  });
}

}  // namespace fused_optim::FUSED_ISA
