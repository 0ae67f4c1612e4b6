// The CPU walker: one parallel region for the whole step, for any number of tensors, groups and dtypes.
// setup.py compiles this file once per instruction set, with FUSED_ISA naming the namespace.
#include "step.h"

#include <tuple>

#include "grads.h"
#include "scalars.h"
#include "walk.h"

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int kBlockBytes = 1024;  // of the params; a block of every stream stays in L1
constexpr int kGroupBytes = 256;   // of the params, between two prefetches

// The loop over the elements of a block: body(i) for every i below `count`, vectorised. P is the type of the param.
// Before each group of elements, prefetch(first, elements) requests as many elements as the group has, for later. A
// core can have few lines in flight. If a whole block were requested at once, the core would wait before it computes.
template <class P, class Prefetch, class Body>
FUSED_HD void for_each(int count, const Prefetch& prefetch, const Body& body) {
  constexpr int kGroup = kGroupBytes / sizeof(P);
  int begin = 0;
  for (; begin + kGroup <= count; begin += kGroup) {
    prefetch(begin, kGroup);
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) body(begin + i);
  }
#pragma omp simd
  for (int i = begin; i < count; ++i) body(i);
}

constexpr auto kNoPrefetch = [](int, int) {};

#define FUSED_INLINE __attribute__((always_inline))

// The streams of one row: param, grad, states.
template <int S>
struct Row {
  Stream param, grad;

  Row(const int64_t* row, int64_t grad_address)
      : param(row, kStreamParam), grad(Stream::of_grad(row, grad_address)), row_(row) {}

  Stream state(int s) const { return Stream(row_, kStreamState0 + s); }
  Stream ema() const { return Stream(row_, kStreamEma); }  // where there is one

  // Load and store all states. anchored8 needs exp_avg_sq as it is stored, so a store changes `states`.
  void load_states(int64_t element, int count, float* const* states) const {
    for (int s = S - 1; s >= 0; --s) state(s).load(element, count, states[s], S > 1 ? states[S > 1] : nullptr);
  }
  void store_states(int64_t element, int count, float* const* states) const {
    for (int s = S - 1; s >= 0; --s) {
      state(s).store(element, count, states[s], S > 1 ? states[S > 1] : nullptr);
      if (s == 1 && state(0).format == kAnchored8) state(1).load(element, count, states[1]);
    }
  }

  CompactStates compact_states(int64_t element) const {  // of a row whose states have these formats
    const Stream exp_avg = state(0), exp_avg_sq = state(1);
    return {{reinterpret_cast<uint8_t*>(exp_avg.at(element)), static_cast<int>(row_[kRowAnchor]),
             thresholds_of(row_, kStreamState0, element)},
            {reinterpret_cast<uint16_t*>(exp_avg_sq.at(element)), thresholds_of(row_, kStreamState0 + 1, element)}};
  }

  void prefetch(int64_t element, int count) const {
    param.prefetch(element, count);
    grad.prefetch(element, count);
    for (int s = 0; s < S; ++s) state(s).prefetch(element, count);
  }

 private:
  const int64_t* row_;
};

// Which pass a loop does. kUpdate is the whole step of rules without a trust ratio. Rules with one are walked by
// kUpdateMoments, and by kApplyUpdate once the ratios are known.
enum class Pass { kUpdate, kUpdateMoments, kApplyUpdate };

// The loop over elements that the compiler vectorises. P, G and A are the storage types of param, grad and states.
// kSpecial: whether betas may be below 0.5 and decay cautious.
template <Pass pass, class Rule, class T, int S, bool kSpecial, class P, class G, class A, class Prefetch>
void update_block(const TensorScalars<T>& scalars, P* param, const G* grad, A* const* states, int count,
                  const Prefetch& prefetch) {
  const TensorScalars<T> h = kSpecial ? scalars : as_usual(scalars);
  A* state[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) state[s] = states[s];
  for_each<P>(count, prefetch, [=](int i) FUSED_INLINE {
    T value[S > 0 ? S : 1];
    for (int s = 0; s < S; ++s) value[s] = widen(state[s][i]);
    const T p = widen(param[i]);
    if constexpr (pass == Pass::kUpdate) narrow(apply<Rule, T, S>(h, p, widen(grad[i]), value), param[i]);
    else if constexpr (pass == Pass::kUpdateMoments)
      Rule::template update_moments<T, S>(h, gradient(h, p, T(widen(grad[i]))), value);
    else narrow(apply_direction<Rule, T, S>(h, p, value), param[i]);
    if constexpr (pass != Pass::kApplyUpdate) {
      for (int s = 0; s < S; ++s) narrow(value[s], state[s][i]);
    }
  });
}

// Reads the states as they are stored: `apply_update` computes its updates from these. A float16 state may have become
// 0. Not inlined: float32 params and masters must be summed by the same instructions, in the same order.
template <class Rule, class T, int S, class P, class G, class A>
__attribute__((noinline)) void measure_block(const TensorScalars<T>& scalars, const P* param, const G* grad,
                                             A* const* states, int count, double* sums) {
  const TensorScalars<T> h = scalars;
  const A* state[S];
  for (int s = 0; s < S; ++s) state[s] = states[s];
  double first_sum = 0.0, second_sum = 0.0;
#pragma omp simd reduction(+ : first_sum, second_sum)
  for (int i = 0; i < count; ++i) {
    T value[S];
    for (int s = 0; s < S; ++s) value[s] = widen(state[s][i]);
    const T p = widen(param[i]);
    const Measured<T> measured = Rule::template measure<T, S>(h, p, gradient(h, p, T(widen(grad[i]))), value);
    const double first = measured.first, second = measured.second;
    first_sum += first * first;
    second_sum += second * second;
  }
  sums[0] += first_sum;
  sums[1] += second_sum;
}

// Two float32 numbers as a pair.
FUSED_HD uint32_t join(float even, float odd) {
  // All inputs are bfloat16, so the lower half of a NaN is 0 and rounding cannot turn it into infinity.
  return (round_to_upper_half(even) >> 16) | (round_to_upper_half(odd) & 0xffff0000u);
}

template <class Rule, int S, class Prefetch>
void update_pairs(const TensorScalars<float>& scalars, Pair* param, const Pair* grad, BFloat16* const* states,
                  int count, const Prefetch& prefetch) {
  const TensorScalars<float> h = as_usual(scalars);
  Pair* state[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) state[s] = reinterpret_cast<Pair*>(states[s]);
  const auto elements = [&](int i, int pairs) FUSED_INLINE { prefetch(2 * i, 2 * pairs); };
  for_each<Pair>(count, elements, [=](int i) FUSED_INLINE {
    float evens[S > 0 ? S : 1], odds[S > 0 ? S : 1];
    for (int s = 0; s < S; ++s) {
      evens[s] = even(state[s][i]);
      odds[s] = odd(state[s][i]);
    }
    const float first = apply<Rule, float, S>(h, even(param[i]), even(grad[i]), evens);
    param[i] = join(first, apply<Rule, float, S>(h, odd(param[i]), odd(grad[i]), odds));
    for (int s = 0; s < S; ++s) state[s][i] = join(evens[s], odds[s]);
  });
}

// All streams in bfloat16: in pairs. If the count is odd, the last element is done alone.
template <Pass pass, class Rule, class T, int S, bool kSpecial, class Prefetch,
          std::enable_if_t<pass == Pass::kUpdate, int> = 0>
void update_block(const TensorScalars<T>& h, BFloat16* param, const BFloat16* grad, BFloat16* const* states, int count,
                  const Prefetch& prefetch) {
  update_pairs<Rule, S>(h, reinterpret_cast<Pair*>(param), reinterpret_cast<const Pair*>(grad), states, count / 2,
                        prefetch);
  if (count % 2 == 0) return;
  BFloat16* last[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) last[s] = states[s] + count - 1;
  update_block<pass, Rule, T, S, kSpecial, BFloat16, BFloat16, BFloat16>(h, param + count - 1, grad + count - 1, last,
                                                                         1, kNoPrefetch);
}

template <class T, class P, class E>
void follow_block(const TensorScalars<T>& scalars, const P* param, E* average, int count) {
  const TensorScalars<T> h = scalars;
  for_each<P>(
      count, [=](int i, int group) FUSED_INLINE { prefetch_ahead(average + i, group); },
      [=](int i) FUSED_INLINE { narrow(averaged<T>(h, widen(average[i]), widen(param[i])), average[i]); });
}

// The averages are updated from the params as they are stored, which are still in the cache.
template <class T, class P>
void average_block(const TensorScalars<T>& h, const P* param, const Stream& ema, int64_t element, int count) {
  const auto follow = [&](auto type) {
    follow_block(h, param, reinterpret_cast<decltype(type)*>(ema.at(element)), count);
  };
  if constexpr (sizeof(T) == 8) follow(double{});
  else visit_format(ema.format, follow);
}

// The usual dtypes, without copies. kUpdateMoments adds the squares of what the rule measures to `sums`, by chunk.
template <Pass pass, class Rule, bool kAverages, class T, int S, class P, class G, class A>
void update_direct(const TensorScalars<T>& h, const Row<S>& row, int64_t begin, int64_t end, double* sums) {
  constexpr int kBlock = kBlockBytes / sizeof(P);
  for (int64_t element = begin; element < end; element += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - element));
    A* states[S > 0 ? S : 1];
    for (int s = 0; s < S; ++s) states[s] = reinterpret_cast<A*>(row.state(s).at(element));
    auto* param = reinterpret_cast<P*>(row.param.at(element));
    const auto* grad = reinterpret_cast<const G*>(row.grad.at(element));
    const auto prefetch = [&](int i, int group) FUSED_INLINE {
      if (end <= kSmallRow) return;  // the row is in a cache
      prefetch_ahead(param + i, group);
      if (pass != Pass::kApplyUpdate) prefetch_ahead(grad + i, group);
      for (int s = 0; s < S; ++s) prefetch_ahead(states[s] + i, group);
    };
    constexpr bool kSpecial = sizeof(T) == 8;
    update_block<pass, Rule, T, S, kSpecial>(h, param, grad, states, count, prefetch);
    if constexpr (pass == Pass::kUpdateMoments)
      measure_block<Rule, T, S>(h, param, grad, states, count, sums + 2 * ((element - begin) / kChunk));
    if constexpr (kAverages) average_block(h, param, row.ema(), element, count);
  }
}

// A bfloat16 param in a packed format, with its gradient and all its states in one loop.
template <class Rule, int S, class P, class States>
void update_codes(const TensorScalars<float>& scalars, const P& param_codes, const BFloat16* grad,
                  const States& state_codes, int count) {
  const TensorScalars<float> h = as_usual(scalars);
  const P param = param_codes;
  const States states = state_codes;
  const auto prefetch = [=](int i, int group) FUSED_INLINE {
    param.prefetch(i, group);
    prefetch_ahead(grad + i, group);
    states.prefetch(i, group);
  };
  for_each<BFloat16>(count, prefetch, [=](int i) FUSED_INLINE {
    float value[S > 0 ? S : 1];
    states.load(i, value);
    param.store(i, apply<Rule, float, S>(h, param.load(i), widen(grad[i]), value));
    states.store(i, value);
  });
}

// The usual packed formats, without copies: master weights with float32 or compact states, and compact states alone.
// Returns false for other formats.
template <class Rule, int S>
bool update_packed(const TensorScalars<float>& h, const Row<S>& row, int64_t begin, int64_t end) {
  const Format param = row.param.format;
  if (!is_packed(param) || row.grad.format != kBfloat16) return false;
  bool floats = param == kSplit16, compact = S == 2;
  for (int s = 0; s < S; ++s) {
    floats &= row.state(s).format == kFloat32;
    compact &= row.state(s).format == (s == 0 ? kAnchored8 : kE8m8);
  }
  if (!floats && !compact) return false;

  constexpr int kBlock = kBlockBytes / sizeof(BFloat16);
  for (int64_t element = begin; element < end; element += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - element));
    const auto* grad = reinterpret_cast<const BFloat16*>(row.grad.at(element));
    row.param.visit_packed(element, [&](auto codes) {
      using P = decltype(codes);
      if constexpr (std::is_same_v<P, Split16Codes>) {
        if (floats) {
          FloatStates<S> states;
          for (int s = 0; s < S; ++s) states.state[s] = reinterpret_cast<float*>(row.state(s).at(element));
          return update_codes<Rule, S>(h, codes, grad, states, count);
        }
      }
      if constexpr (S == 2 && !std::is_same_v<P, E8m8Codes> && !P::anchored)
        update_codes<Rule, S>(h, codes, grad, row.compact_states(element), count);
    });
  }
  return true;
}

// Other formats, small betas and cautious decay: each block is copied to float32 and back.
template <Pass pass, class Rule, bool kAverages, int S>
void update_copied(const TensorScalars<float>& h, const Row<S>& row, int64_t begin, int64_t end, double* sums) {
  constexpr int kBlock = kBlockBytes / sizeof(float);
  alignas(64) float param[kBlock], grad[kBlock], state[S > 0 ? S : 1][kBlock];
  float* states[S > 0 ? S : 1];
  for (int s = 0; s < S; ++s) states[s] = state[s];
  for (int64_t element = begin; element < end; element += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - element));
    row.param.load(element, count, param);
    if (pass != Pass::kApplyUpdate) row.grad.load(element, count, grad);
    row.load_states(element, count, states);
    const auto prefetch = [&](int i, int group) { row.prefetch(element + i, group); };
    update_block<pass, Rule, float, S, true>(h, param, grad, states, count, prefetch);
    if (pass != Pass::kUpdateMoments) row.param.store(element, count, param);
    if (pass != Pass::kApplyUpdate) row.store_states(element, count, states);
    if constexpr (pass == Pass::kUpdateMoments) {
      row.load_states(element, count, states);
      measure_block<Rule, float, S>(h, param, grad, states, count, sums + 2 * ((element - begin) / kChunk));
    }
    if constexpr (kAverages) {
      row.param.load(element, count, param);
      row.ema().load(element, count, grad);
      follow_block<float>(h, param, grad, count);
      row.ema().store(element, count, grad);
    }
  }
}

// The scalars of a row. In the second walk of a rule with a trust ratio, lr is multiplied by the ratio.
template <class T, Pass pass>
TensorScalars<T> scalars_of(const Tables& t, int64_t row, const double* in) {
  TensorScalars<T> h = read_tensor_scalars<T>(in);
  if (pass == Pass::kApplyUpdate) h.lr = static_cast<T>(in[kScalarLr] * t.trust[row]);
  return h;
}

template <Pass pass, class Rule, bool kAverages, int S>
void update_row(const Tables& t, int64_t row_number, int64_t begin, int64_t end, const double* scalars, double* sums) {
  const Row<S> row(t.rows + row_number * kRowWidth, t.grads[row_number]);
  const Format param = row.param.format, grad = row.grad.format, states = S > 0 ? row.state(0).format : param;
  bool alike = true;
  for (int s = 1; s < S; ++s) alike &= row.state(s).format == states;
  if constexpr (kAverages) alike &= !is_packed(row.ema().format);

  if (param == kFloat64) {
    return update_direct<pass, Rule, kAverages, double, S, double, double, double>(
        scalars_of<double, pass>(t, row_number, scalars), row, begin, end, sums);
  }
  const TensorScalars<float> h = scalars_of<float, pass>(t, row_number, scalars);
  const bool special = (pass != Pass::kApplyUpdate && has_small_betas(h)) || h.cautious_decay != 0;
  if constexpr (pass == Pass::kUpdate && !kAverages) {
    if (!special && update_packed<Rule, S>(h, row, begin, end)) return;
  }
  if (alike && param == grad && !special) {
    if (param == kFloat32 && states == kFloat32)
      return update_direct<pass, Rule, kAverages, float, S, float, float, float>(h, row, begin, end, sums);
    if (param == kBfloat16 && states == kBfloat16)
      return update_direct<pass, Rule, kAverages, float, S, BFloat16, BFloat16, BFloat16>(h, row, begin, end, sums);
    if (param == kBfloat16 && states == kFloat32)
      return update_direct<pass, Rule, kAverages, float, S, BFloat16, BFloat16, float>(h, row, begin, end, sums);
  }
  update_copied<pass, Rule, kAverages, S>(h, row, begin, end, sums);
}

// Updates consecutive chunks of one row.
template <Pass pass, class Rule, bool kAverages>
void update(const Tables& t, int64_t first, int64_t end, const double* scalars) {
  double* const sums = t.partials + 2 * first;
  if constexpr (pass == Pass::kUpdateMoments) std::fill(sums, t.partials + 2 * end, 0.0);
  if (scalars[kScalarSkip] != 0.0) return;
  const int64_t row = row_of(t.chunk_table[first]);
  const int64_t* columns = t.rows + row * kRowWidth;
  const int64_t element = chunk_of(t.chunk_table[first]) * kChunk;
  const int64_t end_element = std::min(columns[kRowNumel], element + (end - first) * kChunk);
  visit_states<Rule>(columns[kRowDtypeSignature], [&](auto states) {
    update_row<pass, Rule, kAverages, decltype(states)::value>(t, row, element, end_element, scalars, sums);
  });
}

// Backward after the norm of the gradients: the last gradients are still in the cache.
Order order_of_step(const Tables& t) { return t.squares ? Order::kBackward : Order::kForward; }

template <class Rule, bool kAverages>
void step_all(const Tables& t, int threads) {
  constexpr Pass pass = Rule::trust ? Pass::kUpdateMoments : Pass::kUpdate;
  const auto store = [&](int64_t row, LastRow& last) { prepare<Rule>(t, row, last.at); };
  // The second walk of a rule with a trust ratio reads the scalars from the table.
  const auto open = [&](int64_t row, LastRow& last) {
    if constexpr (!Rule::trust) return open_row<Rule>(t, row, last);
    store(row, last);
    return static_cast<const double*>(t.tensor_scalars + row * kScalarWidth);
  };
  walk_rows<LastRow>(t, threads, order_of_step(t), store, open, [&](int64_t first, int64_t end, const double* scalars) {
    update<pass, Rule, kAverages>(t, first, end, scalars);
  });
  if constexpr (Rule::trust) {
    for (int64_t row = 0; row < t.tensors; ++row) {
      double first = 0.0, second = 0.0;
      for (int64_t i = t.row_offsets[row]; i < t.row_offsets[row + 1]; ++i) {
        first += t.partials[2 * i];
        second += t.partials[2 * i + 1];
      }
      t.sums[2 * row] = first;
      t.sums[2 * row + 1] = second;
    }
  }
}

template <class Rule, bool kAverages>
void apply_update_all(const Tables& t, int threads) {
  // Backward: the last params and states of the first walk are still in the cache.
  const auto open = [&](int64_t row, std::tuple<>&) {
    const double* scalars = t.tensor_scalars + row * kScalarWidth;
    if (scalars[kScalarSkip] == 0.0) t.trust[row] = ratio_of<Rule>(t, row);
    return scalars;
  };
  walk_rows<std::tuple<>>(t, threads, Order::kBackward, open, open, [&](int64_t first, int64_t end, const double* x) {
    update<Pass::kApplyUpdate, Rule, kAverages>(t, first, end, x);
  });
}

bool step(const char* rule, const Tables& t, int threads) {
  return visit_rule(rule, [&](auto tag) {
    using Rule = typename decltype(tag)::type;
    if constexpr (!Rule::trust) {
      if (t.ema) return step_all<Rule, true>(t, threads);
    }
    step_all<Rule, false>(t, threads);
  });
}

bool apply_update(const char* rule, const Tables& t, int threads) {
  return visit_rule(rule, [&](auto tag) {
    using Rule = typename decltype(tag)::type;
    if constexpr (Rule::trust) {
      if (t.ema) apply_update_all<Rule, true>(t, threads);
      else apply_update_all<Rule, false>(t, threads);
    }
  });
}

}  // namespace

const CpuWalker walker = {step, apply_update, squares, scale, bandwidth_probe};

}  // namespace fused_optim::FUSED_ISA
